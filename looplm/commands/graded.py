"""Graded answers of several runs side by side: one table, one CSV file, one picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from looplm.callbacks.output import write_figure
from looplm.errors import InputError
from looplm.group_figures import bands_by_depth

__all__ = ["GradedCurve", "read_graded", "write_graded"]

GRADED_FILE = "test_graded.csv"


@dataclass(frozen=True, kw_only=True)
class GradedCurve:
    """Accuracy of the graded answers of one run to one test corpus.

    Example:
        >>> interval = {"low": (0.1, 0.4), "high": (0.3, 0.6)}
        >>> curve = GradedCurve(run="a", source="easy", depths=(1, 4), accuracy=(0.2, 0.5), **interval)
        >>> dict(zip(curve.depths, curve.accuracy))
        {1: 0.2, 4: 0.5}
    """

    run: str
    """Name of the run."""
    source: str
    """Name of the corpus."""
    depths: tuple[int, ...]
    """Loops, increasing."""
    accuracy: tuple[float, ...]
    """Share of right answers at each depth."""
    low: tuple[float, ...]
    """Lower ends of the intervals that the run's test wrote."""
    high: tuple[float, ...]
    """Upper ends."""


def read_graded(run_dir: Path) -> list[GradedCurve]:
    r"""Return the graded curves of a run, one a corpus; none where it was not graded.

    Raises:
        InputError: If the file is there and cannot be read.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> _ = (run / "test_graded.csv").write_text("source,depth,accuracy,low,high\neasy,4,0.5,0.4,0.6\n")
        >>> read_graded(run)[0].accuracy
        (0.5,)
    """
    path = run_dir / GRADED_FILE
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found: dict[str, list[tuple[int, float, float, float]]] = {}
            for row in csv.DictReader(file):
                point = int(row["depth"]), float(row["accuracy"]), float(row["low"]), float(row["high"])
                found.setdefault(row["source"], []).append(point)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} has no graded accuracy by depth ({type(error).__name__}: {error}).") from None
    curves = []
    for source, points in found.items():
        depths, accuracy, low, high = zip(*sorted(points), strict=True)
        name = run_dir.resolve().name
        curves.append(GradedCurve(run=name, source=source, depths=depths, accuracy=accuracy, low=low, high=high))
    return curves


def write_graded(curves: Sequence[GradedCurve], output: Path) -> None:
    """Print the table and write ``graded.csv`` and ``graded.png``.

    Args:
        curves: Of all runs.
        output: A folder that exists.

    Example:
        >>> import contextlib, io, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> curve = GradedCurve(run="a", source="easy", depths=(1,), accuracy=(0.5,), low=(0.4,), high=(0.6,))
        >>> with contextlib.redirect_stdout(io.StringIO()):
        ...     write_graded([curve], folder)
        >>> sorted(path.name for path in folder.iterdir())
        ['graded.csv', 'graded.png']
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    with (output / "graded.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "source", "depth", "accuracy", "low", "high"])
        for curve in curves:
            columns = zip(curve.depths, curve.accuracy, curve.low, curve.high, strict=True)
            writer.writerows([curve.run, curve.source, *row] for row in columns)
    percent = {
        f"{curve.run}, {curve.source}": [(curve.depths, [100 * value for value in curve.accuracy])] for curve in curves
    }
    figure = bands_by_depth(percent, title="Graded answers", ylabel="right answers (%)", limits=(-3.0, 103.0))
    write_figure(output / "graded.png", figure)
    table = Table(title="Graded answers: right (%) by depth")
    table.add_column("depth", justify="right")
    for curve in curves:
        table.add_column(Text(f"{curve.run}\n{curve.source}"), justify="right", overflow="fold")
    values = [dict(zip(curve.depths, curve.accuracy, strict=True)) for curve in curves]
    for depth in sorted({depth for curve in curves for depth in curve.depths}):
        table.add_row(f"{depth:,}", *(f"{100 * value[depth]:.1f}" if depth in value else "" for value in values))
    console = Console()
    console.print(table)
    console.print(f"graded:  {output / 'graded.csv'}, {output / 'graded.png'}", highlight=False, soft_wrap=True)
