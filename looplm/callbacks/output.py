"""What callbacks leave behind: files that are never half-written, and figures for the loggers that can show them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looplm.figures import draw, encode_png

if TYPE_CHECKING:
    import lightning as L

    from looplm.figures import Figure

__all__ = ["publish_figure", "replace_file", "step_of_figures", "write_figure", "write_table"]


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder) / "runs" / "a.txt", b"new")
        ...     (Path(folder) / "runs" / "a.txt").read_text()
        'new'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as a CSV file, the keys as its head.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.csv"
        >>> write_table(path, [{"depth": 1, "exact_match": 0.5}])
        >>> path.read_text().split()
        ['depth,exact_match', '1,0.5']
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG file of 150 dots an inch.

    Example:
        >>> import tempfile
        >>> from looplm.figures import depth_curves
        >>> path = Path(tempfile.mkdtemp()) / "curve.png"
        >>> write_figure(path, depth_curves({"run": ([0, 1], [0.0, 1.0])}))
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    replace_file(path, encode_png(draw(figure)))


def step_of_figures(trainer: L.Trainer) -> int:
    """Return the trainer's step, or the logged metric ``step``, which takes its place, as it does for scalars.

    Every process has to call it: reading what was logged with ``sync_dist`` is a reduction over all of them.

    Example:
        >>> import lightning as L
        >>> step_of_figures(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
        0
    """
    return int(trainer.callback_metrics.get("step", trainer.global_step))


def publish_figure(trainer: L.Trainer, key: str, figure: Figure, path: Path, step: int) -> None:
    """Write a figure as :func:`write_figure` does and give it to every logger that takes one, under ``key``.

    It is drawn once. One process calls it, with what :func:`step_of_figures` returned.

    Example:
        >>> import tempfile
        >>> import lightning as L
        >>> from looplm.figures import depth_curves
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> figure = depth_curves({"run": ([0, 1], [0.0, 1.0])})
        >>> publish_figure(trainer, "val/curve", figure, Path(tempfile.mkdtemp()) / "val_curve.png", step=0)
    """
    pixels = draw(figure)
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_image"):
            experiment.add_image(key, pixels[..., :3], global_step=step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(key, [figure], step=step)
    replace_file(path, encode_png(pixels))
