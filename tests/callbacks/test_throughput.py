"""What the meter logs, against what was run; with the real Trainer and a CSV file."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from looplm import (
    ArithmeticDataModule,
    JacobianPenalty,
    LoopedConfig,
    LoopLM,
    STARSObjective,
    ThroughputMeter,
    UniformDepth,
)
from looplm.cli import main
from looplm.flops import penalty_flops, training_flops

PAUSE = 0.02


class Foreign(L.LightningModule):
    """A project of its own: no loops, no tokens, a step that takes a known time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(PAUSE)
        return self.layer(batch).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(50 * PAUSE)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(
    folder: Path, meter: ThroughputMeter, module: L.LightningModule, data: Any, *after: L.Callback, **options: Any
) -> list[dict]:
    logger = CSVLogger(folder, name="", version="")
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=logger,
        callbacks=[meter, *after],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, **data)
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("train/tokens_per_second")]


def _loader(num_batches: int) -> DataLoader[Tensor]:
    return DataLoader([torch.ones(3)] * 4 * num_batches, batch_size=4)


def test_operations_follow_the_depths_that_were_drawn(tmp_path: Path) -> None:
    penalty = JacobianPenalty(fraction=0.5)
    objective = STARSObjective(
        depth_sampler=UniformDepth(min_depth=1, max_depth=9),
        penalty=penalty,
        penalty_weight=0.1,
        penalty_start_step=3,
        backprop_loops=4,
    )
    data, again = (
        ArithmeticDataModule(min_digits=2, max_digits=2, batch_size=8, num_val=8, num_test=8) for _ in range(2)
    )
    size = {"vocab_size": data.vocab_size, "max_positions": data.max_positions}
    module = LoopLM(LoopedConfig(**size, width=16, num_heads=2, ffn_width=32), objective)
    options = {"max_steps": 6, "log_every_n_steps": 1, "limit_val_batches": 0}
    rows = _fit(tmp_path, ThroughputMeter(peak_flops=1e12), module, {"datamodule": data}, **options)
    assert len(rows) == 6
    batches = list(islice(again.train_dataloader(), 6))
    depths = [int(float(row["train/depth"])) for row in rows]
    assert len(set(depths)) > 2
    for step, (batch, depth, row) in enumerate(zip(batches, depths, rows, strict=True)):
        length, num_labels = batch["input_ids"].shape[1], int((batch["labels"] != -100).sum())
        expected = training_flops(module.config, 8, length, depth, 4, num_labels)
        expected += penalty_flops(module.config, 8, length, penalty) if step >= 3 else 0
        assert float(row["train/flops_per_step"]) == pytest.approx(expected, rel=1e-6)
        # Both have the same time below the line.
        rate = float(row["train/loops_per_second"]) / depth
        assert float(row["train/mfu"]) == pytest.approx(rate * expected / 1e12, rel=1e-4)


def test_padding_is_no_token_and_micro_batches_add_up(tmp_path: Path) -> None:
    class Padded(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            time.sleep(PAUSE)
            return self.layer(batch["input_ids"].float()).mean()

    mask = torch.tensor([1, 1, 0])
    rows = [{"input_ids": torch.ones(3), "attention_mask": mask}] * 24
    data = {"train_dataloaders": DataLoader(rows, batch_size=4)}
    meter = ThroughputMeter(loops_fn=lambda module, batch: 5, flops_fn=lambda module, batch: 700.0)
    options = {"max_epochs": 1, "log_every_n_steps": 1, "accumulate_grad_batches": 3}
    rows = _fit(tmp_path, meter, Padded(), data, **options)
    assert len(rows) == 2
    for row in rows:
        assert float(row["train/flops_per_step"]) == pytest.approx(3 * 700)
        assert float(row["train/tokens_per_second"]) / float(row["train/loops_per_second"]) == pytest.approx(8 / 5)
        assert not row.get("train/mfu")  # a CPU is in no table


def test_a_foreign_project_gives_functions_and_validation_takes_no_time(tmp_path: Path) -> None:
    meter = ThroughputMeter(tokens_fn=lambda module, batch: batch.numel())
    data = {"train_dataloaders": _loader(8), "val_dataloaders": _loader(1)}
    options = {"max_epochs": 1, "log_every_n_steps": 4, "val_check_interval": 2}
    rows = _fit(tmp_path, meter, Foreign(), data, **options)
    assert [int(row["step"]) for row in rows] == [3, 7]
    assert not any(row.get("train/loops_per_second") or row.get("train/flops_per_step") for row in rows)
    # A step takes at least its pause. Two of the four were followed by a validation of 50 pauses.
    at_most = 12 / PAUSE
    rates = [float(row["train/tokens_per_second"]) for row in rows]
    assert all(rate <= at_most for rate in rates)
    assert max(rates) >= at_most * 4 / 54  # what is left if one validation is counted


def test_a_batch_of_another_form_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch does not have: give `tokens_fn`"):
        _fit(tmp_path, ThroughputMeter(), Foreign(), {"train_dataloaders": _loader(1)}, max_epochs=1)


def test_a_config_names_the_meter(write_config: Callable[..., Path], tmp_path: Path) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "csv", "version": ""}}
    callbacks = [{"class_path": "ThroughputMeter", "init_args": {"peak_flops": 1e11}}]
    config = write_config(
        trainer__callbacks=callbacks, trainer__logger=logger, trainer__default_root_dir=str(tmp_path / "run")
    )
    assert main(["fit", "--config", str(config)]) == 0
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/mfu"]]
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert all(0 < float(row["train/mfu"]) < 1 for row in rows)


@pytest.mark.parametrize("peak", [0.0, -1.0])
def test_a_peak_that_is_none_is_refused(peak: float) -> None:
    with pytest.raises(ValueError, match="`peak_flops` must be > 0"):
        ThroughputMeter(peak_flops=peak)


def test_a_peak_without_operations_is_refused(tmp_path: Path) -> None:
    meter = ThroughputMeter(tokens_fn=lambda module, batch: batch.numel(), peak_flops=1e9)
    with pytest.raises(ValueError, match="Foreign has no `flops_per_batch`; give `flops_fn`"):
        _fit(tmp_path, meter, Foreign(), {"train_dataloaders": _loader(1)}, max_epochs=1)


class _Draws(L.Callback):
    """Stands behind the meter and takes its time at the end of a validation."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        time.sleep(50 * PAUSE)


def test_what_others_do_at_the_end_of_a_validation_is_left_out(tmp_path: Path) -> None:
    rates = []
    for name, after in (("without", []), ("with", [_Draws()])):
        data = {"train_dataloaders": _loader(12), "val_dataloaders": _loader(1)}
        meter = ThroughputMeter(tokens_fn=lambda module, batch: batch.numel())
        rows = _fit(
            tmp_path / name, meter, Foreign(), data, *after, max_epochs=1, val_check_interval=4, log_every_n_steps=3
        )
        rates.append([float(row["train/tokens_per_second"]) for row in rows])
    assert len(rates[0]) == len(rates[1]) == 4
    assert min(rates[1]) > 0.5 * min(rates[0])


def test_a_trainer_that_never_logs_is_no_error(tmp_path: Path) -> None:
    module, meter = Foreign(), ThroughputMeter(tokens_fn=lambda module, batch: batch.numel())
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        callbacks=[meter],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        log_every_n_steps=0,
    )
    trainer.fit(module, _loader(2))
    assert trainer.global_step == 2
