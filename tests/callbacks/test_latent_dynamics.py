"""The dynamics of foreign models whose Jacobians are known."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from looplm import DepthAccuracyCurve, LatentDynamicsMonitor, LoopState

DEPTHS = [1, 4]
EIGENVALUES = torch.tensor([0.8, -0.5, 0.1])


class _Ids(Dataset[dict[str, Tensor]]):
    """Three tokens, the first two real."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(7, (3,), generator=draw), "attention_mask": torch.tensor([1, 1, 0])}


def _loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(_Ids(), batch_size=2)


class Foreign(L.LightningModule):
    """``h ↦ diag(0.8, −0.5, 0.1) h + e`` on every position, with dropout that must be off."""

    def __init__(self, scale: float = 1.0, **outputs: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.rates = nn.Parameter(scale * EIGENVALUES)
        self.dropout = nn.Dropout(0.5)
        self.outputs = outputs
        self.num_embedded = 0

    def embed(self, inputs: Tensor, attention_mask: Any = None, initial_hidden: Any = None) -> LoopState:
        assert not torch.is_grad_enabled()
        self.num_embedded += 1
        return LoopState(torch.randn(*inputs.shape, 3), {"e": self.table(inputs), "attention_mask": attention_mask})

    def step(self, state: LoopState) -> LoopState:
        return state.advance(self.dropout(state.hidden * self.rates + state.context["e"]))

    def decode(self, state: LoopState) -> Tensor:
        return state.hidden

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.rates.square().sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        preds = torch.zeros(2, len(batch["input_ids"]), dtype=torch.long)
        return {"depths": DEPTHS, "depth_preds": preds, "labels": preds[0], **self.outputs}

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _trainer(folder: Path, *callbacks: L.Callback, logger: Any = False, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=1,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 0, **options},
    )


def _monitor(**options: Any) -> LatentDynamicsMonitor:
    return LatentDynamicsMonitor(DEPTHS, **{"num_products": 20, "with_figures": False, **options})


def _logged(trainer: L.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("how", ["validate", "test"])
def test_known_quantities_are_logged_and_written(tmp_path: Path, how: str) -> None:
    stage = "val" if how == "validate" else "test"
    trainer = _trainer(tmp_path, _monitor(with_figures=True))
    getattr(trainer, how)(Foreign(), _loader(), verbose=False)
    logged = _logged(trainer)
    gain = EIGENVALUES.square().mean().item()
    for row, depth in zip(_rows(tmp_path / f"{stage}_dynamics.csv"), DEPTHS, strict=True):
        assert logged[f"{stage}/dynamics/spectral_radius/depth_{depth:05d}"] == pytest.approx(0.8, rel=1e-3)
        assert logged[f"{stage}/dynamics/spectral_norm/depth_{depth:05d}"] == pytest.approx(0.8, rel=1e-3)
        error = float(row["mean_gain_standard_error"])
        assert abs(logged[f"{stage}/dynamics/mean_gain/depth_{depth:05d}"] - gain) < 5 * error
        assert logged[f"{stage}/dynamics/lyapunov_exponent/depth_{depth:05d}"] < 0
        assert (row["split"], row["depth"], row["num_sequences"]) == (stage, str(depth), "2")
        for name in ("residual", "state_norm", "spectral_radius"):
            mean = float(row[name])
            assert mean == pytest.approx(logged[f"{stage}/dynamics/{name}/depth_{depth:05d}"], rel=1e-5)
            assert float(row[f"{name}_min"]) <= mean * (1 + 1e-6)
            assert mean <= float(row[f"{name}_max"]) * (1 + 1e-6)
    assert logged[f"{stage}/dynamics/residual/depth_00004"] < logged[f"{stage}/dynamics/residual/depth_00001"]
    written = {path.name.removeprefix(f"{stage}_") for path in tmp_path.iterdir()}
    figures = {f"{name}.png" for name in ("residual", "state_norm", "gains", "lyapunov", "paths_2d", "paths_3d")}
    assert written == {"dynamics.csv", *figures}


def test_accuracy_is_drawn_over_stability_whichever_callback_comes_first(tmp_path: Path) -> None:
    for name, callbacks in {
        "after": (DepthAccuracyCurve(), _monitor(with_figures=True)),
        "before": (_monitor(with_figures=True), DepthAccuracyCurve()),
    }.items():
        _trainer(tmp_path / name, *callbacks).test(Foreign(), _loader(), verbose=False)
        assert (tmp_path / name / "test_accuracy_and_stability.png").read_bytes().startswith(b"\x89PNG")


def test_figures_and_scalars_reach_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="board")
    _trainer(tmp_path, _monitor(with_figures=True), logger=logger, limit_train_batches=1, log_every_n_steps=1).fit(
        Foreign(), _loader(), _loader()
    )
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert "val/dynamics/residual" in events.Tags()["images"]
    assert events.Scalars("val/dynamics/spectral_radius/depth_00004")[-1].value == pytest.approx(0.8, rel=1e-3)
    assert (tmp_path / "board" / "val_dynamics.csv").is_file()


def test_leading_eigenvalues_are_drawn_on_request(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    _trainer(tmp_path, _monitor(num_eigenvalues=3, with_figures=True)).test(Foreign(), _loader(), verbose=False)
    assert (tmp_path / "test_eigenvalues.png").read_bytes().startswith(b"\x89PNG")


def test_training_flags_and_random_state_are_as_before(tmp_path: Path) -> None:
    model = Foreign()

    class Watch(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            model.dropout.train()  # somebody's validation runs with dropout
            self.state = torch.random.get_rng_state()

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert model.dropout.training
            assert not model.training
            assert torch.equal(torch.random.get_rng_state(), self.state)

    trainer = _trainer(tmp_path, Watch(), _monitor(), limit_val_batches=1)
    trainer.validate(model, _loader(), verbose=False)
    # With dropout on, the radius would not be that of the map.
    assert _logged(trainer)["val/dynamics/spectral_radius/depth_00004"] == pytest.approx(0.8, rel=1e-3)


def test_numbers_are_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    model = Foreign()

    def measured(seed: int) -> dict[str, float]:
        trainer = _trainer(tmp_path, _monitor(seed=seed))
        trainer.validate(model, _loader(), verbose=False)
        return _logged(trainer)

    first = measured(0)
    torch.manual_seed(123)
    assert measured(0) == first
    assert measured(1) != first


def test_sanity_check_is_not_measured(tmp_path: Path) -> None:
    model = Foreign()
    trainer = _trainer(tmp_path, _monitor(), num_sanity_val_steps=1, limit_val_batches=0)
    trainer.fit(model, _loader(), _loader())
    assert model.num_embedded == 0


@pytest.mark.parametrize(("num_batches", "num_sequences", "counted"), [(1, 8, 2), (1, 1, 1), (3, 8, 5), (3, 1, 3)])
def test_number_of_sequences_is_controlled(tmp_path: Path, num_batches: int, num_sequences: int, counted: int) -> None:
    model = Foreign()
    monitor = _monitor(num_batches=num_batches, num_sequences=num_sequences)
    _trainer(tmp_path, monitor).test(model, _loader(), verbose=False)
    assert {row["num_sequences"] for row in _rows(tmp_path / "test_dynamics.csv")} == {str(counted)}
    assert model.num_embedded == num_batches


def test_what_is_switched_off_is_not_logged(tmp_path: Path) -> None:
    monitor = _monitor(num_products=0, num_samples=0, num_iterations=0, with_lyapunov=False)
    trainer = _trainer(tmp_path, monitor)
    trainer.test(Foreign(), _loader(), verbose=False)
    assert {key.split("/")[2] for key in _logged(trainer)} == {"residual", "state_norm"}
    assert [path.name for path in tmp_path.iterdir()] == ["test_dynamics.csv"]


def test_every_nth_validation_of_fit_is_measured_and_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    model, monitor = Foreign(), _monitor(every_n_evaluations=3)
    trainer = _trainer(tmp_path, monitor, limit_train_batches=1, max_epochs=5)
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(model, _loader(), _loader())
    assert model.num_embedded == 2  # validations 1 and 4
    resumed = _monitor(every_n_evaluations=3)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.state_dict() == {"num_evaluations": 5}
    # A validation by hand is always measured.
    _trainer(tmp_path, resumed).validate(model, _loader(), verbose=False)
    assert model.num_embedded == 3


def test_dataloaders_are_told_apart(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _monitor())
    trainer.validate(Foreign(), [_loader(), _loader()], verbose=False)
    logged = _logged(trainer)
    assert {"val/dynamics/residual/depth_00004", "val/set1/dynamics/residual/depth_00004"} <= set(logged)
    assert [row["split"] for row in _rows(tmp_path / "val_dynamics.csv")] == ["val", "val", "set1", "set1"]


def test_name_of_the_evaluation_set_is_that_of_the_outputs(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _monitor(with_figures=True), DepthAccuracyCurve())
    trainer.validate(Foreign(split="hard"), _loader(), verbose=False)
    assert {"val/hard/dynamics/residual/depth_00004", "val/hard/exact_match/depth_00004"} <= set(_logged(trainer))
    assert (tmp_path / "val_accuracy_and_stability.png").exists()


def test_looped_model_may_be_made_of_the_module(tmp_path: Path) -> None:
    class Wraps(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Foreign(scale=1.5)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    trainer = _trainer(tmp_path, _monitor(looped_model_fn=lambda module: module.inner))
    trainer.test(Wraps(), _loader(), verbose=False)
    assert _logged(trainer)["test/dynamics/spectral_radius/depth_00004"] == pytest.approx(1.2, rel=1e-3)
    with pytest.raises(TypeError, match=r"Wraps lacks \['embed', 'step', 'decode'\]: define them .*looped_model_fn"):
        _trainer(tmp_path, _monitor()).test(Wraps(), _loader(), verbose=False)


def test_batches_without_ids_are_an_error_that_names_the_fix(tmp_path: Path) -> None:
    class Other(Foreign):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    images = DataLoader([torch.zeros(3, dtype=torch.long)] * 2, batch_size=2)
    with pytest.raises(KeyError, match=r"reads `input_ids`.* got Tensor: pass `inputs_fn`"):
        _trainer(tmp_path, _monitor()).test(Other(), images, verbose=False)
    trainer = _trainer(tmp_path, _monitor(inputs_fn=lambda batch: (batch, None)))
    trainer.test(Other(), images, verbose=False)
    assert math.isfinite(_logged(trainer)["test/dynamics/residual/depth_00004"])


def test_a_state_that_overflows_is_reported_not_an_error(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _monitor(num_eigenvalues=1, with_figures=True))
    trainer.test(Foreign(scale=1e8), _loader(), verbose=False)
    logged = _logged(trainer)
    assert math.isfinite(logged["test/dynamics/residual/depth_00001"])
    assert not math.isfinite(logged["test/dynamics/residual/depth_00004"])
    assert (tmp_path / "test_gains.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [4, 1]}, r"`depths` must be non-negative and strictly increasing, got \[4, 1\]"),
        ({"num_batches": 0}, "`num_batches` must be >= 1, got 0"),
        ({"num_sequences": 0}, "`num_sequences` must be >= 1, got 0"),
        ({"every_n_evaluations": 0}, "`every_n_evaluations` must be >= 1, got 0"),
        ({"num_products": -1}, "`num_products` must be >= 0, got -1"),
        ({"num_samples": 1}, "`num_samples` must be 0 or >= 2"),
        ({"method": "reverse"}, "`method` must be one of"),
        ({"num_eigenvalues": 2, "with_figures": False}, "`num_eigenvalues` has no effect without `with_figures`"),
        ({"method": "vjp"}, "set `num_iterations: 0` and `with_lyapunov: false`"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentDynamicsMonitor(**options)
