"""A run that is interrupted and resumed ends with the weights, bit for bit, of one that was not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from forks import fork_looplm, run_looplm
from lightning.pytorch.callbacks import ModelCheckpoint

from looplm import (
    ArithmeticDataModule,
    FixedDepth,
    JacobianPenalty,
    LogNormalDepth,
    LoopedConfig,
    LoopLM,
    ScheduledDepth,
    STARSObjective,
    UniformDepth,
)
from looplm.callbacks.preemption import SaveOnSignal
from looplm.cli import main
from looplm.corpora.arithmetic import DigitStage
from looplm.depth import DepthStage
from looplm.lr_schedule import LRSchedule


class _Stop(Exception):
    """The interruption."""


class _StopAt(L.Callback):
    """Interrupts training in the middle of micro-batch ``micro_batch``, after its backward pass."""

    def __init__(self, micro_batch: int) -> None:
        self.left = micro_batch

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Stop


class _Seen(L.Callback):
    """Records which problems were trained on, at which depth."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows.append((int(batch["index"][0]), float(trainer.callback_metrics["train/depth"])))


PENALISED = STARSObjective(
    depth_sampler=UniformDepth(1, 5),
    penalty=JacobianPenalty(fraction=0.5),
    penalty_weight=0.2,
    penalty_start_step=2,
    penalty_ramp_steps=3,
)
SCHEDULED = STARSObjective(
    depth_sampler=ScheduledDepth(
        [
            DepthStage(start_step=0, sampler=FixedDepth(2)),
            DepthStage(start_step=3, sampler=LogNormalDepth(mu=1.0, sigma=0.5, max_depth=6)),
        ]
    )
)
RANDOM = STARSObjective(depth_sampler=UniformDepth(1, 5))


def _module(objective: STARSObjective, dropout: float, data: ArithmeticDataModule) -> LoopLM:
    config = LoopedConfig(
        vocab_size=data.vocab_size,
        max_positions=data.max_positions,
        width=16,
        num_heads=2,
        ffn_width=32,
        dropout=dropout,
    )
    return LoopLM(config, objective, lr_schedule=LRSchedule(warmup_steps=2), val_depths=[1, 3], seed=5)


def _fit(
    folder: Path,
    objective: STARSObjective,
    *callbacks: L.Callback,
    dropout: float = 0.0,
    accumulate: int = 1,
    save_every: int = 1,
    validate_every: int = 3,
    max_steps: int = 7,
    ckpt_path: Path | None = None,
) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    stages = [
        DigitStage(start_step=0, min_digits=1, max_digits=1),
        DigitStage(start_step=3, min_digits=2, max_digits=2),
    ]
    data = ArithmeticDataModule(
        min_digits=2, max_digits=2, digit_stages=stages, batch_size=8, num_val=8, eval_batch_size=4, seed=5
    )
    module, seen = _module(objective, dropout, data), _Seen()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=save_every), seen, *callbacks],
    )
    # What another part of the process drew from the global generators must not matter.
    torch.manual_seed(time.time_ns() % 1000)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except _Stop:
        pass
    return module.state_dict(), seen.rows


def _assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    ("objective", "dropout", "accumulate", "save_every", "stop"),
    [
        pytest.param(RANDOM, 0.0, 1, 1, 4, id="random-depth"),
        pytest.param(RANDOM, 0.0, 1, 3, 3, id="saved-where-validation-runs"),
        pytest.param(RANDOM, 0.0, 1, 3, 5, id="steps-since-the-checkpoint-are-run-again"),
        pytest.param(RANDOM, 0.2, 1, 2, 3, id="dropout"),
        pytest.param(RANDOM, 0.2, 2, 1, 7, id="accumulation-stopped-within-a-step"),
        pytest.param(RANDOM, 0.0, 2, 3, 9, id="accumulation-stopped-later"),
        pytest.param(PENALISED, 0.1, 1, 1, 5, id="penalty-within-its-ramp"),
        pytest.param(PENALISED, 0.1, 2, 1, 6, id="penalty-with-accumulation"),
        pytest.param(SCHEDULED, 0.0, 1, 1, 2, id="schedule-stopped-before-its-switch"),
        pytest.param(SCHEDULED, 0.0, 2, 1, 8, id="schedule-stopped-after-its-switch"),
    ],
)
def test_resumed_run_has_the_weights_of_an_undisturbed_one(
    tmp_path: Path, objective: STARSObjective, dropout: float, accumulate: int, save_every: int, stop: int
) -> None:
    options: dict[str, Any] = {"dropout": dropout, "accumulate": accumulate, "save_every": save_every}
    undisturbed, all_rows = _fit(tmp_path / "whole", objective, **options)
    before, first_rows = _fit(tmp_path / "cut", objective, _StopAt(stop), **options)
    assert not torch.equal(before["model.token_embedding.weight"], undisturbed["model.token_embedding.weight"])

    resumed, rows = _fit(tmp_path / "cut", objective, ckpt_path=tmp_path / "cut" / "last.ckpt", **options)

    _assert_equal(resumed, undisturbed)
    steps_kept = stop // accumulate // save_every * save_every
    assert first_rows == all_rows[:stop]
    assert rows == all_rows[steps_kept * accumulate :]


def test_run_may_be_interrupted_twice(tmp_path: Path) -> None:
    undisturbed, _ = _fit(tmp_path / "whole", RANDOM, dropout=0.1)
    last = tmp_path / "cut" / "last.ckpt"
    _fit(tmp_path / "cut", RANDOM, _StopAt(2), dropout=0.1)
    _fit(tmp_path / "cut", RANDOM, _StopAt(3), dropout=0.1, ckpt_path=last)
    resumed, _ = _fit(tmp_path / "cut", RANDOM, dropout=0.1, ckpt_path=last)
    _assert_equal(resumed, undisturbed)


def test_killed_process_resumes_bit_identically(tmp_path: Path, write_config: Any) -> None:
    # Enough steps that the process is still training when the first checkpoint is seen.
    config = write_config(
        trainer__max_steps=24,
        trainer__val_check_interval=1000,
        checkpoint__every_n_train_steps=3,
        model__config__dropout=0.1,
        # Slow steps: the kill arrives in the middle.
        model__objective={
            "depth_sampler": {"class_path": "UniformDepth", "init_args": {"min_depth": 30, "max_depth": 60}}
        },
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    last, output = killed / "checkpoints" / "last.ckpt", tmp_path / "output"
    fit = {root: ["fit", "--config", config, f"--trainer.default_root_dir={root}"] for root in (killed, whole)}
    process = fork_looplm(fit[killed], output)
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL

    assert torch.load(last, weights_only=True)["global_step"] < 24
    run_looplm(*fit[killed], "--ckpt_path=last")
    run_looplm(*fit[whole])

    resumed, undisturbed = (
        torch.load(root / "checkpoints" / "last.ckpt", weights_only=True) for root in (killed, whole)
    )
    assert resumed["global_step"] == undisturbed["global_step"] == 24
    _assert_equal(resumed["state_dict"], undisturbed["state_dict"])


def test_last_checkpoint_holds_the_last_step_and_a_longer_run_continues_from_it(
    tmp_path: Path, write_config: Any
) -> None:
    # 3 is no multiple of the 2 steps between checkpoints. A constant learning rate: the schedule spans `max_steps`.
    config = write_config(model__lr_schedule={"min_ratio": 1.0}, checkpoint__every_n_train_steps=2)
    grown, whole = tmp_path / "grown", tmp_path / "whole"

    def state(root: Path) -> dict[str, Any]:
        return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)

    fit = ["fit", "--config", str(config)]
    assert main([*fit, f"--trainer.default_root_dir={grown}", "--trainer.max_steps=3"]) == 0
    assert state(grown)["global_step"] == 3
    assert main([*fit, f"--trainer.default_root_dir={grown}", "--trainer.max_steps=6", "--ckpt_path=last"]) == 0
    assert main([*fit, f"--trainer.default_root_dir={whole}", "--trainer.max_steps=6"]) == 0

    _assert_equal(state(grown)["state_dict"], state(whole)["state_dict"])


def test_what_went_on_from_its_own_checkpoint_is_saved_as_a_run_from_the_beginning(
    tmp_path: Path, write_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    root = f"--trainer.default_root_dir={tmp_path / 'run'}"
    assert main(["fit", "--config", str(write_config()), root, "--trainer.max_steps=2"]) == 0
    assert "nothing was trained" not in caplog.text
    assert "exact match on val" in caplog.text
    caplog.clear()
    again = ["fit", "--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path=last"]
    assert main(again) == 0
    assert f"nothing was trained: {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'} stands at step 2" in caplog.text
    assert "exact match on val" not in caplog.text
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["ckpt_path"] is None
    # Of another run's checkpoint it is part of what the run is, and a run directory is name enough.
    other = [*again[:-1], f"--ckpt_path={tmp_path / 'run'}", "--trainer.max_steps=3"]
    assert main([*other, f"--trainer.default_root_dir={tmp_path / 'other'}"]) == 0
    kept = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["ckpt_path"]
    assert kept == str(tmp_path / "run" / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.default_int_handler], ids=["background", "foreground"])
def test_ctrl_c_is_taken_over_for_the_run_unless_it_is_ignored(tmp_path: Path, before: Any) -> None:
    seen: list[Any] = []

    class Look(SaveOnSignal):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(signal.getsignal(signal.SIGINT))

    data = ArithmeticDataModule(min_digits=2, max_digits=2, batch_size=4, num_val=4)
    was = signal.signal(signal.SIGINT, before)
    try:
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=1,
            limit_val_batches=0,
            callbacks=[Look()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_module(STARSObjective(depth_sampler=FixedDepth(1)), 0.0, data), data)
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, was)
    assert (seen == [before]) == (before == signal.SIG_IGN)
    assert (signal.SIG_IGN in seen) == (before == signal.SIG_IGN)


def test_second_fit_in_a_directory_replaces_the_last_checkpoint(tmp_path: Path, write_config: Any) -> None:
    # `test` reads last.ckpt; a version beside it would leave it with the weights of the run before.
    fit = ["fit", "--config", str(write_config()), f"--trainer.default_root_dir={tmp_path / 'run'}"]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert main(fit) == 0
    first = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    assert main([*fit, "--seed_everything=1"]) == 0
    second = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(first["model.token_embedding.weight"], second["model.token_embedding.weight"])
    assert [path.name for path in checkpoints.glob("last*")] == ["last.ckpt"]


def test_a_linked_last_checkpoint_is_renewed_whole_and_a_dead_link_is_told(
    write_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config, folder = str(write_config(checkpoint__save_last="link")), tmp_path / "run"
    argv = ["fit", "--config", config, f"--trainer.default_root_dir={folder}"]
    last = folder / "checkpoints" / "last.ckpt"
    assert main([*argv, "--trainer.max_steps=2"]) == 0
    first = os.readlink(last)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", _killed)
        with pytest.raises(_Stop):
            main([*argv, "--ckpt_path=last"])
    assert os.readlink(last) == first
    assert main([*argv, "--ckpt_path=last"]) == 0
    assert os.readlink(last) != first
    assert not [path for path in last.parent.iterdir() if path.name.startswith(".")]

    last.resolve().unlink()
    capfd.readouterr()
    assert main([*argv, "--ckpt_path=last"]) == 2
    assert "links to 'epoch=0-step=4.ckpt', which is not there" in capfd.readouterr().err


def _killed(*args: object) -> None:
    raise _Stop
