"""The accuracy curve in a project that knows nothing of looplm but the callback."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from looplm import DepthAccuracyCurve

DEPTHS = [0, 2, 8]
LABELS = torch.tensor([[-100, 1, 2], [-100, 3, 4], [-100, 5, 6], [-100, 7, -100]])
# Right at depth 0: nothing; at 2: samples 0 and 3, and one token of 1; at 8: all.
PREDS = torch.stack(
    [
        torch.zeros_like(LABELS),
        torch.tensor([[9, 1, 2], [9, 3, 0], [9, 0, 0], [9, 7, 9]]),
        LABELS.clamp(min=0),
    ]
)
EXACT, TOKEN = [0.0, 0.5, 1.0], [0.0, 4 / 7, 1.0]
SETTLING = {"settling_depth_median": 2.0, "settling_depth_p99": 8.0, "escapes": 0.0}


class _Numbers(Dataset[int]):
    def __init__(self, size: int = 4) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> int:
        return i


def _loader() -> DataLoader[int]:
    # 3 + 1: batches are uneven.
    return DataLoader(_Numbers(), batch_size=3)


class Foreign(L.LightningModule):
    """Somebody else's module: it looks its predictions up."""

    def __init__(self, splits: list[str] | None = None, **extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.splits, self.extra = splits, extra

    def outputs(self, rows: Tensor, dataloader_idx: int) -> dict[str, Any]:
        preds = PREDS[:, rows]
        if dataloader_idx == 1:
            preds = torch.zeros_like(preds)
        found = {"depths": torch.tensor(DEPTHS), "depth_preds": preds, "labels": LABELS[rows], "index": rows}
        if self.splits is not None:
            found["split"] = self.splits[dataloader_idx]
        return found | self.extra

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight**2

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.outputs(batch, dataloader_idx)

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.outputs(batch, dataloader_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(folder: Path, *callbacks: L.Callback, logger: Any = False, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=2,
        log_every_n_steps=1,
        logger=logger,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "num_sanity_val_steps": 0,
            **options,
        },
    )


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _columns(path: Path, split: str) -> tuple[list[int], list[float], list[float]]:
    rows = [row for row in _read_csv(path) if row["split"] == split]
    depths = [int(row["depth"]) for row in rows]
    exact, token = ([float(row[name]) for row in rows] for name in ("exact_match", "token_accuracy"))
    return depths, exact, token


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


EXPECTED_KEYS = {
    **{f"val/exact_match/depth_{depth:05d}": value for depth, value in zip(DEPTHS, EXACT, strict=True)},
    **{f"val/token_accuracy/depth_{depth:05d}": value for depth, value in zip(DEPTHS, TOKEN, strict=True)},
    "val/exact_match/peak": 1.0,
    "val/exact_match/peak_depth": 8.0,
}


def test_curve_reaches_tensorboard_and_csv_logger_during_fit(tmp_path: Path) -> None:
    tensorboard = TensorBoardLogger(tmp_path, name="", version="board")
    table = CSVLogger(tmp_path, name="", version="table")
    _trainer(tmp_path, DepthAccuracyCurve(), logger=[tensorboard, table]).fit(Foreign(), _loader(), _loader())

    events = _events(tmp_path / "board")
    assert {key: events.Scalars(key)[-1].value for key in EXPECTED_KEYS} == pytest.approx(EXPECTED_KEYS)
    rows = [row for row in _read_csv(tmp_path / "table" / "metrics.csv") if row["val/exact_match/depth_00008"]]
    assert {key: float(rows[-1][key]) for key in EXPECTED_KEYS} == pytest.approx(EXPECTED_KEYS)


def test_figure_reaches_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="board")
    trainer = _trainer(tmp_path, DepthAccuracyCurve(), logger=logger)
    trainer.fit(Foreign(), _loader(), _loader())
    trainer.test(Foreign(), _loader(), verbose=False)
    logger.finalize("success")
    events = _events(tmp_path / "board")
    assert set(events.Tags()["images"]) == {
        f"{stage}/{figure}_by_depth" for stage in ("val", "test") for figure in ("exact_match", "settling")
    }
    (image,) = events.Images("test/exact_match_by_depth")
    assert image.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("how", ["fit", "validate", "test"])
def test_files_stand_in_the_log_directory(tmp_path: Path, how: str) -> None:
    trainer = _trainer(tmp_path, DepthAccuracyCurve(), logger=TensorBoardLogger(tmp_path, name="", version="logs"))
    if how == "fit":
        trainer.fit(Foreign(), _loader(), _loader())
    else:
        getattr(trainer, how)(Foreign(), _loader(), verbose=False)
    stage = "test" if how == "test" else "val"
    folder = tmp_path / "logs"
    assert _columns(folder / f"{stage}_curve.csv", stage) == (DEPTHS, EXACT, pytest.approx(TOKEN))
    assert json.loads((folder / f"{stage}_summary.json").read_text()) == {
        stage: {"peak": 1.0, "peak_depth": 8.0, "num_samples": 4, **SETTLING}
    }
    assert (folder / f"{stage}_curve.png").read_bytes().startswith(b"\x89PNG")
    # No half-written file is left beside them.
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_files_are_written_without_any_logger(tmp_path: Path) -> None:
    _trainer(tmp_path, DepthAccuracyCurve()).test(Foreign(), _loader(), verbose=False)
    names = {"test_curve.csv", "test_curve.png", "test_settling.png", "test_summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_answers_that_are_lost_again_show_in_table_summary_and_logger(tmp_path: Path) -> None:
    class Loses(Foreign):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            found = self.outputs(batch, dataloader_idx)
            return found | {"depth_preds": found["depth_preds"][[0, 2, 1]]}  # all right at 2, samples 0 and 3 at 8

    trainer = _trainer(tmp_path, DepthAccuracyCurve())
    trainer.test(Loses(), _loader(), verbose=False)
    with (tmp_path / "test_curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["settled"]) for row in rows] == [0.0, 1.0, 1.0]
    assert [float(row["escaped"]) for row in rows] == [0.0, 0.0, 0.5]
    assert json.loads((tmp_path / "test_summary.json").read_text())["test"]["escapes"] == 0.5
    assert float(trainer.callback_metrics["test/exact_match/escapes"]) == 0.5


@pytest.mark.parametrize("how", ["validate", "test"])
def test_dataloaders_are_told_apart_by_their_split(tmp_path: Path, how: str) -> None:
    trainer = _trainer(tmp_path, DepthAccuracyCurve())
    getattr(trainer, how)(Foreign(splits=["", "hard"]), [_loader(), _loader()], verbose=False)
    stage = "test" if how == "test" else "val"
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert logged[f"{stage}/exact_match/depth_00008"] == 1.0
    assert logged[f"{stage}/hard/exact_match/depth_00008"] == 0.0
    assert logged[f"{stage}/hard/token_accuracy/depth_00008"] == 0.0
    assert _columns(tmp_path / f"{stage}_curve.csv", stage)[1] == EXACT
    assert _columns(tmp_path / f"{stage}_curve.csv", "hard")[1] == [0.0, 0.0, 0.0]
    assert json.loads((tmp_path / f"{stage}_summary.json").read_text())["hard"]["num_samples"] == 4


@pytest.mark.parametrize("splits", [None, ["same", "same"], ["", "test"]])
def test_dataloaders_without_distinct_names_are_an_error_that_names_the_fix(
    tmp_path: Path, splits: list[str] | None
) -> None:
    # Their keys would be equal: one curve would silently hide the other.
    with pytest.raises(ValueError, match="`split`"):
        _trainer(tmp_path, DepthAccuracyCurve()).test(Foreign(splits=splits), [_loader(), _loader()], verbose=False)


def test_extract_fn_adapts_other_outputs(tmp_path: Path) -> None:
    class Other(Foreign):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"answers": PREDS[:, batch]}

    def extract(outputs: Any, batch: Any) -> dict[str, Any]:
        return {"depths": DEPTHS, "depth_preds": outputs["answers"], "labels": LABELS[batch]}

    _trainer(tmp_path, DepthAccuracyCurve(extract_fn=extract)).test(Other(), _loader(), verbose=False)
    assert _columns(tmp_path / "test_curve.csv", "test")[1] == EXACT


@pytest.mark.parametrize("key", ["depths", "depth_preds", "labels"])
def test_missing_key_is_an_error_that_names_the_fix(tmp_path: Path, key: str) -> None:
    class Incomplete(Foreign):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            found = self.outputs(batch, dataloader_idx)
            del found[key]
            return found

    with pytest.raises(KeyError, match=f"'{key}'.* are missing.*Return a dict with these keys, or pass `extract_fn`"):
        _trainer(tmp_path, DepthAccuracyCurve()).validate(Incomplete(), _loader(), verbose=False)


def test_step_that_returns_no_dict_is_an_error_that_says_what_it_got(tmp_path: Path) -> None:
    class Scalar(Foreign):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return torch.zeros(())

    with pytest.raises(KeyError, match=r"got Tensor.*extract_fn"):
        _trainer(tmp_path, DepthAccuracyCurve()).test(Scalar(), _loader(), verbose=False)


def test_depths_that_change_between_batches_are_refused(tmp_path: Path) -> None:
    class Fickle(Foreign):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.outputs(batch, dataloader_idx) | {"depths": [0, 2, 8 + batch_idx]}

    with pytest.raises(ValueError, match=r"\[0, 2, 9\] after \[0, 2, 8\]"):
        _trainer(tmp_path, DepthAccuracyCurve()).test(Fickle(), _loader(), verbose=False)


def test_one_depth_is_a_curve_too(tmp_path: Path) -> None:
    class Single(Foreign):
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"depths": [2], "depth_preds": PREDS[1:2, batch], "labels": LABELS[batch]}

    _trainer(tmp_path, DepthAccuracyCurve()).test(Single(), _loader(), verbose=False)
    assert _columns(tmp_path / "test_curve.csv", "test") == ([2], [0.5], pytest.approx([4 / 7]))


def test_checkpoints_can_be_chosen_by_the_accuracy_at_a_depth(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path / "checkpoints", monitor="val/exact_match/depth_00002", mode="max", filename="best"
    )
    # The callback comes after the curve in the list; Lightning runs checkpoints last in any case.
    _trainer(tmp_path, checkpoint, DepthAccuracyCurve()).fit(Foreign(), _loader(), _loader())
    assert float(checkpoint.best_model_score) == 0.5
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def test_sanity_check_counts_for_nothing(tmp_path: Path) -> None:
    class Watch(L.Callback):
        written: bool | None = None

        def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.written = (tmp_path / "val_curve.csv").exists()

    class NoIndex(Foreign):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            found = self.outputs(batch, dataloader_idx)
            del found["index"]  # so that samples counted twice show
            return found

    watch = Watch()
    _trainer(tmp_path, DepthAccuracyCurve(), watch, num_sanity_val_steps=1).fit(NoIndex(), _loader(), _loader())
    assert watch.written is False
    assert json.loads((tmp_path / "val_summary.json").read_text())["val"]["num_samples"] == 4


def test_repeated_samples_count_once_if_their_index_is_given(tmp_path: Path) -> None:
    repeated = DataLoader([0, 1, 2, 3, 3, 3], batch_size=4)
    _trainer(tmp_path, DepthAccuracyCurve()).test(Foreign(), repeated, verbose=False)
    assert _columns(tmp_path / "test_curve.csv", "test")[1] == EXACT


@pytest.mark.parametrize(
    ("curve", "extra"), [(DepthAccuracyCurve(mean_depth=2.0), {}), (DepthAccuracyCurve(), {"mean_depth": 2.0})]
)
def test_mean_trained_depth_enters_the_summary(
    tmp_path: Path, curve: DepthAccuracyCurve, extra: dict[str, Any]
) -> None:
    trainer = _trainer(tmp_path, curve)
    trainer.test(Foreign(**extra), _loader(), verbose=False)
    summary = json.loads((tmp_path / "test_summary.json").read_text())["test"]
    assert summary == {
        "peak": 1.0,
        "peak_depth": 8.0,
        "at_02x": 1.0,
        "at_04x": 1.0,
        "num_samples": 4,
        "mean_depth": 2.0,
        **SETTLING,
    }
    assert float(trainer.callback_metrics["test/exact_match/at_04x"]) == 1.0


def test_every_validation_starts_anew(tmp_path: Path) -> None:
    class Improves(Foreign):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            found = self.outputs(batch, dataloader_idx)
            return found if self.global_step >= 2 else found | {"depth_preds": torch.zeros_like(found["depth_preds"])}

    logger = TensorBoardLogger(tmp_path, name="", version="board")
    _trainer(tmp_path, DepthAccuracyCurve(), logger=logger, limit_train_batches=1, max_epochs=-1).fit(
        Improves(), _loader(), _loader()
    )
    values = [event.value for event in _events(tmp_path / "board").Scalars("val/exact_match/depth_00008")]
    assert values == [0.0, 1.0]
