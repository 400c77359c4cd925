"""A run that ends between a checkpoint and its validation validates when it goes on, as if nothing had been."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import end_of_ranks, looplm_main, run_looplm

from looplm.cli import main

STEPS = 6
DYNAMICS = {"depths": [1, 3], "num_sequences": 3, "num_products": 2, "with_figures": False, "every_n_evaluations": 2}
# Two steps apart, validations and checkpoints fall on the same steps.
CONFIG = {
    "trainer__max_steps": STEPS,
    "trainer__num_sanity_val_steps": 1,
    "trainer__callbacks": [{"class_path": "LatentDynamicsMonitor", "init_args": DYNAMICS}],
    "model__config__dropout": 0.1,
    "model__lr_schedule": {"min_ratio": 1.0},  # the schedule spans `max_steps`
    "checkpoint__monitor": "val/dynamics/state_norm/depth_00003",
    "checkpoint__mode": "max",
    "checkpoint__save_top_k": 2,
}


def _fit(config: Path, folder: Path, *more: str) -> list[str]:
    logger = ("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=log")
    return ["fit", "--config", str(config), f"--trainer.default_root_dir={folder}", *logger, "--ckpt_path=last", *more]


def _kill(where: str, step: int, number: int) -> list[str]:
    values = {"step": step, "number": int(number), "where": where}
    return ["--trainer.callbacks+=killing.Kill", *(f"--trainer.callbacks.{k}={v}" for k, v in values.items())]


def _saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def _logged(folder: Path, start: str) -> list[dict[str, str]]:
    """Return what the runs in a folder have logged, in the order of the runs, of what begins with ``start``."""
    files = sorted(folder.glob("log/*/metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    kept = [{k: v for k, v in row.items() if v and (k.startswith(start) or k == "step")} for row in rows]
    return [row for row in kept if len(row) > 1]


def _validations(folder: Path) -> list[dict[str, str]]:
    return _logged(folder, "val/")


def _plain(value: Any, folder: Path) -> Any:
    """Return a state without the folder of its run, so that it can be compared with that of another run."""
    if isinstance(value, dict):
        return {_plain(key, folder): _plain(item, folder) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value.replace(str(folder), "") if isinstance(value, str) else value


def _assert_same_end(folder: Path, whole: Path) -> None:
    first, second = _saved(folder), _saved(whole)
    assert first["global_step"] == second["global_step"] == STEPS
    weights = first["state_dict"], second["state_dict"]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    assert _plain(first["callbacks"], folder) == _plain(second["callbacks"], whole)
    names = ({path.name for path in at.glob("checkpoints/*")} for at in (folder, whole))
    assert next(names) == next(names)
    assert (folder / "val_curve.csv").read_text() == (whole / "val_curve.csv").read_text()


@pytest.mark.parametrize(
    ("where", "step", "number", "num_ranks"),
    [
        ("step", 4, signal.SIGTERM, 1),
        ("validation", 2, signal.SIGKILL, 1),
        ("validation", STEPS, signal.SIGKILL, 1),
        ("validation", 4, signal.SIGKILL, 2),
        pytest.param("validation", STEPS, signal.SIGKILL, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_as_if_no_validation_had_been_cut_off(
    tmp_path: Path, write_config: Callable[..., Path], where: str, step: int, number: int, num_ranks: int
) -> None:
    config, folder, whole = write_config(**CONFIG), tmp_path / "cut", tmp_path / "whole"
    ranks = [] if num_ranks == 1 else ["--config", "conf/overlays/ddp.yaml", "--trainer.devices=2"]
    ranks += ["--trainer.accelerator=cpu"]
    run_looplm(*_fit(config, whole, *ranks), num_ranks=num_ranks)

    killed = [*_fit(config, folder, *ranks), *_kill(where, step, number)]
    codes, said = end_of_ranks(looplm_main, killed, num_ranks=num_ranks)
    assert codes == [143 if number == signal.SIGTERM else -number] * num_ranks, said
    assert _saved(folder)["global_step"] == step
    assert [row["step"] for row in _validations(folder)] == [str(at - 1) for at in range(2, step, 2)]

    said = run_looplm(*_fit(config, folder, *ranks), num_ranks=num_ranks)
    assert f"the validation that was due at step {step} comes first" in said
    assert ("nothing was trained" in said) == (step == STEPS)
    assert "exact match on val" in said
    assert _validations(folder) == _validations(whole)
    _assert_same_end(folder, whole)
    assert _saved(folder)["callbacks"]["OwedValidation"] == {"owed_at": None}


def test_a_longer_run_goes_on_from_a_validation_at_the_end(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    config, grown, whole = write_config(**CONFIG), tmp_path / "grown", tmp_path / "whole"
    assert main(_fit(config, grown, "--trainer.max_steps=4")) == 0
    assert main(_fit(config, grown)) == 0
    assert main(_fit(config, whole)) == 0
    assert _validations(grown) == _validations(whole)
    assert _logged(grown, "train/loss") == _logged(whole, "train/loss")
    _assert_same_end(grown, whole)


def test_what_owes_nothing_or_may_not_validate_goes_on_with_the_next_step(
    tmp_path: Path, write_config: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    config, folder = write_config(**CONFIG), tmp_path / "run"
    end_of_ranks(looplm_main, [*_fit(config, folder), *_kill("validation", 2, signal.SIGKILL)], num_ranks=1)
    owing = _saved(folder)
    assert owing["callbacks"]["OwedValidation"] == {"owed_at": 2}
    last = folder / "checkpoints" / "last.ckpt"

    assert main(_fit(config, folder, "--trainer.limit_val_batches=0")) == 0
    assert _validations(folder) == []

    del owing["callbacks"]["OwedValidation"]  # as of an older version
    torch.save(owing, last)
    assert main(_fit(config, folder)) == 0
    assert "comes first" not in caplog.text
    assert [row["step"] for row in _validations(folder)] == ["3", "5"]


def test_last_lines_name_what_is_there(
    tmp_path: Path, write_config: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    config, folder = write_config(trainer__limit_val_batches=0, trainer__max_steps=1), tmp_path / "run"
    assert main(["fit", "--config", str(config), f"--trainer.default_root_dir={folder}"]) == 0
    assert f"run directory: {folder} (config.yaml, checkpoints/)\n" in caplog.text
    caplog.clear()
    nothing = ["--trainer.max_epochs=0", f"--trainer.default_root_dir={tmp_path / 'none'}"]
    assert main(["fit", "--config", str(config), *nothing]) == 0
    assert "nothing was trained: the run stands at step 0" in caplog.text
