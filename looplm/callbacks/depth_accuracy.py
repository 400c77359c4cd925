"""Log accuracy by depth, in any Lightning project.

Reads what ``validation_step`` and ``test_step`` return and never calls the model; knows no module and no config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from looplm.callbacks.output import publish_figure, replace_file, step_of_figures, write_table
from looplm.figures import depth_curves, settling_by_depth
from looplm.metrics import DepthExactMatch, DepthSettling, DepthTokenAccuracy, depth_summary

__all__ = ["DepthAccuracyCurve"]

ExtractFn: TypeAlias = Callable[[Any, Any], Mapping[str, Any]]
_REQUIRED = ("depths", "depth_preds", "labels")
_COLUMNS = ("split", "depth", "exact_match", "token_accuracy", "settled", "escaped")


class _Split:
    """The metrics of one evaluation set."""

    def __init__(self, name: str, depths: list[int], mean_depth: float | None, device: Any) -> None:
        self.name, self.depths, self.mean_depth = name, depths, mean_depth
        self.exact_match = DepthExactMatch(len(depths)).to(device)
        self.token_accuracy = DepthTokenAccuracy(len(depths)).to(device)
        self.settling = DepthSettling(len(depths)).to(device)

    def key(self, stage: str, metric: str) -> str:
        return "/".join(part for part in (stage, self.name, metric) if part)


class DepthAccuracyCurve(L.Callback):
    """Exact match and token accuracy at every evaluated depth, and how answers settle.

    ``validation_step`` and ``test_step`` return a dict (or ``extract_fn`` makes one of what they return):

    - ``depths``: K increasing depths (loops), int ``(K,)``, the same in all batches;
    - ``depth_preds``: predicted ids, int64 ``(K, B, …)``: ``depth_preds[k, b, i]`` answers ``labels[b, i]``;
    - ``labels``: int64 ``(B, …)``, −100 = ignored;
    - optionally ``index`` ``(B,)`` (sample numbers: a sample that the distributed sampler repeats counts once),
      ``split`` (name of the evaluation set, needed with several dataloaders), ``mean_depth`` (mean trained depth,
      loops).

    It logs ``{stage}/exact_match/depth_00008`` and ``{stage}/token_accuracy/depth_00008`` for every depth, and a
    summary (see :func:`~looplm.metrics.depth_summary`), to every logger; gives the figures to every logger that takes
    some; and writes ``{stage}_curve.csv``, ``{stage}_summary.json``, ``{stage}_curve.png`` and ``{stage}_settling.png``
    into the log directory. The table's columns ``settled`` and ``escaped`` and the last picture are the distribution
    of the settling depth (see :class:`~looplm.metrics.DepthSettling`).

    Args:
        extract_fn: ``extract_fn(outputs, batch)`` returns the dict above.
        mean_depth: Mean trained depth (loops); None: what the outputs say, if they do.

    Example:
        >>> trainer = L.Trainer(callbacks=[DepthAccuracyCurve()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, extract_fn: ExtractFn | None = None, mean_depth: float | None = None) -> None:
        self.extract_fn = extract_fn
        if mean_depth is not None and not mean_depth > 0:
            raise ValueError(f"`mean_depth` must be > 0, got {mean_depth}.")
        self.mean_depth = mean_depth
        self._splits: dict[int, _Split] = {}

    def _update(self, stage: str, pl_module: L.LightningModule, outputs: Any, batch: Any, dataloader_idx: int) -> None:
        found = outputs if self.extract_fn is None else self.extract_fn(outputs, batch)
        missing = [key for key in _REQUIRED if not isinstance(found, Mapping) or key not in found]
        if missing:
            has = sorted(found) if isinstance(found, Mapping) else type(found).__name__
            raise KeyError(
                f"DepthAccuracyCurve needs {list(_REQUIRED)} from validation_step/test_step, {missing} are missing, "
                f"got {has}. Return a dict with these keys, or pass `extract_fn` to make one."
            )
        depths = [int(depth) for depth in found["depths"]]
        split = self._splits.get(dataloader_idx)
        if split is None:
            mean = self.mean_depth if self.mean_depth is not None else found.get("mean_depth")
            mean = None if mean is None else float(mean)
            split = _Split(found.get("split", ""), depths, mean, pl_module.device)
            names = [other.name or stage for other in self._splits.values()]
            if (split.name or stage) in names:
                raise ValueError(
                    f"evaluation sets must have different names, got {split.name or stage!r} after {names}: "
                    "return a `split` for every dataloader but one."
                )
            self._splits[dataloader_idx] = split
        if split.depths != depths:
            raise ValueError(f"`depths` must be the same in all batches, got {depths} after {split.depths}.")
        preds, labels, indices = found["depth_preds"], found["labels"], found.get("index")
        split.exact_match.update(preds, labels, indices)
        split.token_accuracy.update(preds, labels, indices)
        split.settling.update(preds, labels, indices)

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir  # a broadcast: on all ranks
        rows: list[dict[str, Any]] = []
        summaries: dict[str, dict[str, Any]] = {}
        for split in self._splits.values():
            exact_match, token_accuracy = split.exact_match.compute().tolist(), split.token_accuracy.compute().tolist()
            settled, escaped = split.settling.compute().tolist()
            with split.exact_match.sync_context(should_sync=trainer.world_size > 1):
                num_samples = split.exact_match.num_samples
            summary = depth_summary(split.depths, exact_match, split.mean_depth, (settled, escaped))
            logged = {
                f"{split.key(stage, name)}/depth_{depth:05d}": value
                for name, column in (("exact_match", exact_match), ("token_accuracy", token_accuracy))
                for depth, value in zip(split.depths, column, strict=True)
            }
            logged |= {f"{split.key(stage, 'exact_match')}/{name}": value for name, value in summary.items()}
            pl_module.log_dict(logged, rank_zero_only=False, sync_dist=trainer.world_size > 1)
            title = split.name or stage
            summaries[title] = {**summary, "num_samples": num_samples}
            if split.mean_depth is not None:
                summaries[title]["mean_depth"] = split.mean_depth
            columns = (split.depths, exact_match, token_accuracy, settled, escaped)
            rows += [dict(zip(_COLUMNS, (title, *row), strict=True)) for row in zip(*columns, strict=True)]
        if rows:
            folder = Path(log_dir or trainer.default_root_dir)
            self._write(trainer, stage, folder, rows, summaries, step_of_figures(trainer))
        self._splits = {}

    @rank_zero_only
    def _write(self, trainer: L.Trainer, stage: str, folder: Path, rows: Any, summaries: Any, step: int) -> None:
        def columns(*names: str) -> dict[str, tuple[list[Any], ...]]:
            return {
                title: tuple([row[name] for row in rows if row["split"] == title] for name in names)
                for title in summaries
            }

        means = {title: summary["mean_depth"] for title, summary in summaries.items() if "mean_depth" in summary}
        curve: Any = columns("depth", "exact_match")
        settling: Any = columns("depth", "settled", "escaped")
        figures = {
            "curve": ("exact_match_by_depth", depth_curves(curve, mean_depths=means)),
            "settling": ("settling_by_depth", settling_by_depth(settling)),
        }
        for file_name, (key, figure) in figures.items():
            publish_figure(trainer, f"{stage}/{key}", figure, folder / f"{stage}_{file_name}.png", step)
        write_table(folder / f"{stage}_curve.csv", rows)
        replace_file(folder / f"{stage}_summary.json", json.dumps(summaries, indent=2).encode())

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self._splits = {}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        if not trainer.sanity_checking:
            self._update("val", pl_module, outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and write the curve."""
        self._finish(trainer, pl_module, "val")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._update("test", pl_module, outputs, batch, dataloader_idx)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and write the curve."""
        self._finish(trainer, pl_module, "test")
