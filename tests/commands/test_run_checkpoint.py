"""What a run saves, when, and with which weights."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import fork_looplm

from looplm.cli import main

MONITOR = "val/dynamics/state_norm/depth_00003"


def _monitored(every_n_evaluations: int = 1, **more: Any) -> dict[str, Any]:
    """Return a run of ten steps, saved every second and validated every third, with two best checkpoints."""
    options = {"depths": [1, 3], "num_sequences": 3, "num_products": 2, "with_figures": False}
    dynamics = {
        "class_path": "LatentDynamicsMonitor",
        "init_args": {**options, "every_n_evaluations": every_n_evaluations},
    }
    return {
        "trainer__max_steps": 10,
        "trainer__val_check_interval": 3,
        "trainer__callbacks": [dynamics],
        "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        "checkpoint__monitor": MONITOR,
        "checkpoint__mode": "max",
        "checkpoint__save_top_k": 2,
        **more,
    }


def _argv(config: Path, folder: Path, *more: str) -> list[str]:
    return ["fit", "--config", str(config), f"--trainer.default_root_dir={folder}", *more]


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def _killed(argv: list[str], step: int, output: Path, batch: int = 1) -> None:
    values = {"step": step, "batch": batch, "number": int(signal.SIGKILL)}
    kill = ["--trainer.callbacks+=killing.Kill", *(f"--trainer.callbacks.{k}={v}" for k, v in values.items())]
    process = fork_looplm([*argv, *kill], output)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, output.read_text()


def _best(state: dict[str, Any]) -> dict[int, float]:
    """Return scores by the step in the file's name."""
    (callback,) = [value for key, value in state["callbacks"].items() if key.startswith("RunCheckpoint")]
    found = callback["best_k_models"]
    return {int(Path(path).stem.partition("step=")[2]): float(score) for path, score in found.items()}


def _measured(config: Path, path: Path, folder: Path) -> float:
    validate = ["validate", "--config", str(config), f"--ckpt_path={path}", f"--trainer.default_root_dir={folder}"]
    assert main(validate) == 0
    rows = list(csv.DictReader((folder / "val_dynamics.csv").read_text().splitlines()))
    return next(float(row["state_norm"]) for row in rows if row["depth"] == "3")


@pytest.mark.parametrize("save_last", [True, "link"])
def test_best_checkpoints_are_those_that_were_measured_and_last_does_not_wait_for_them(
    tmp_path: Path, write_config: Callable[..., Path], save_last: bool | str
) -> None:
    config, folder = write_config(**_monitored(checkpoint__save_last=save_last)), tmp_path / "run"
    last = folder / "checkpoints" / "last.ckpt"
    _killed(_argv(config, folder), 3, tmp_path / "output")
    assert _load(last)["global_step"] == 2
    assert _best(_load(last)) == {}

    assert main(_argv(config, folder, "--ckpt_path=last")) == 0
    state = _load(last)
    assert state["global_step"] == 10
    best = _best(state)
    assert len(best) == 2
    assert best.keys() <= {3, 6, 9}
    files = {path for path in last.parent.iterdir() if path != last}
    assert {_load(path)["global_step"] for path in files} == best.keys()
    for path in files:
        step = _load(path)["global_step"]
        assert path.name == f"epoch=0-step={step}.ckpt"
        assert _measured(config, path, tmp_path / "validated") == pytest.approx(best[step])


def test_a_score_of_an_earlier_validation_is_given_to_no_other_weights(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(**_monitored(every_n_evaluations=2, checkpoint__save_top_k=-1))
    assert main(_argv(config, tmp_path / "run")) == 0
    assert _best(_load(tmp_path / "run" / "checkpoints" / "last.ckpt")).keys() == {3, 9}


def test_a_step_that_is_saved_and_validated_may_be_among_the_best(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config, folder = write_config(**_monitored(trainer__val_check_interval=2, trainer__max_steps=4)), tmp_path / "run"
    assert main(_argv(config, folder)) == 0
    state = _load(folder / "checkpoints" / "last.ckpt")
    assert _best(state).keys() == {2, 4}
    assert state["global_step"] == 4


def test_what_is_never_measured_is_told(
    tmp_path: Path, write_config: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(checkpoint__monitor="val/exact_match/depth_00007")
    assert main(_argv(config, tmp_path / "run")) == 2
    assert "could not find the monitored key" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint__train_time_interval": "0:00:00", "checkpoint__every_n_train_steps": None},
        {"checkpoint__every_n_epochs": 1, "checkpoint__every_n_train_steps": None},
        {"checkpoint__every_n_train_steps": 1},
    ],
    ids=["minutes", "validations", "steps"],
)
def test_nothing_is_saved_while_gradients_are_accumulated(
    tmp_path: Path, write_config: Callable[..., Path], options: dict[str, Any]
) -> None:
    # Validations after batches 4, 8 and 12, steps after every third batch.
    accumulated = {"trainer__accumulate_grad_batches": 3, "trainer__val_check_interval": 4, "trainer__max_steps": 4}
    config = write_config(**accumulated, **options)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert main(_argv(config, whole)) == 0
    # Twice: a resumed run does not know that the step at which it stands is saved.
    for more in ((), ("--ckpt_path=last",)):
        _killed(_argv(config, cut, *more), 3, tmp_path / "output", batch=3)
        state = _load(cut / "checkpoints" / "last.ckpt")
        batches = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        assert batches == 3 * state["global_step"] == 6
    assert main(_argv(config, cut, "--ckpt_path=last")) == 0
    states = [_load(root / "checkpoints" / "last.ckpt") for root in (cut, whole)]
    assert states[0]["global_step"] == states[1]["global_step"] == 4
    weights = [state["state_dict"] for state in states]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
