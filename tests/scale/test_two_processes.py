"""What callbacks and commands do on two processes: evaluation counts once, a step is skipped by all or none."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import end_of_ranks, fork_looplm, looplm_main, run_looplm
from processes import BASE, TWO_ON_CPU

from looplm.cli import main

TWO = {name: ["--config", f"conf/overlays/{name}.yaml", *TWO_ON_CPU] for name in ("ddp", "fsdp")}


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    options = ["--trainer.max_steps=1", f"--trainer.default_root_dir={folder}"]
    assert main(["fit", "--config", str(base), *options]) == 0
    return folder / "checkpoints" / "last.ckpt"


def _table(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_dynamics_of_a_repeated_sample_count_once(base: Path, trained: Path, tmp_path: Path) -> None:
    # 21 samples: the second process gets one that the first has, too.
    dynamics = ["--trainer.callbacks+=LatentDynamicsMonitor", "--trainer.callbacks.init_args.depths=[1,3]"]
    dynamics += ["--trainer.callbacks.init_args.num_sequences=64", "--trainer.callbacks.init_args.num_products=2"]
    argv = ["test", "--config", base, f"--ckpt_path={trained}", *dynamics]
    for name, options in (("one", []), ("two", TWO["ddp"])):
        run_looplm(*argv, *options, f"--trainer.default_root_dir={tmp_path / name}", num_ranks=1 + (name == "two"))
    one, two = (_table(tmp_path / name / "test_dynamics.csv") for name in ("one", "two"))
    for expected, found in zip(one, two, strict=True):
        assert found["num_sequences"] == expected["num_sequences"] == str(BASE["data"]["init_args"]["num_test"])
        for quantity in ("residual", "residual_min", "residual_max", "state_norm"):  # others draw vectors by process
            assert float(found[quantity]) == pytest.approx(float(expected[quantity]), rel=1e-5)
    assert (tmp_path / "two" / "test_residual.png").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_step_that_is_bad_on_one_process_is_skipped_by_both(base: Path, tmp_path: Path, strategy: str) -> None:
    bad = ["--trainer.callbacks+=bad_rank.BadRank", "--trainer.callbacks.rank=1", "--trainer.callbacks.step=2"]
    said = run_looplm(
        "fit", "--config", base, *TWO[strategy], *bad, f"--trainer.default_root_dir={tmp_path}", num_ranks=2
    )
    assert "step 2 (depth" in said
    assert "is skipped: its loss or gradient is not finite" in said
    before, after, end = (
        torch.load(tmp_path / "checkpoints" / f"epoch=0-step={step}.ckpt", weights_only=True)["state_dict"]
        for step in (2, 3, 5)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.isfinite().all() for weight in end.values())
    assert not all(torch.equal(after[name], end[name]) for name in end)


def test_answers_are_asked_of_one_process(base: Path, trained: Path, tmp_path: Path) -> None:
    argv = ["predict", "--config", base, f"--ckpt_path={trained}", *TWO["ddp"]]
    process = fork_looplm(argv, tmp_path / "said")
    process.join(120)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 2, said
    assert "looplm: error: `predict` runs in one process, got `trainer.devices` 2 " in said
    assert "Traceback" not in said


def test_plain_ddp_says_what_deep_steps_need(base: Path, tmp_path: Path) -> None:
    argv = ["fit", "--config", base, *TWO_ON_CPU, "--trainer.strategy=ddp", f"--trainer.default_root_dir={tmp_path}"]
    codes, said = end_of_ranks(looplm_main, [str(part) for part in argv], num_ranks=2)
    assert codes == [2, 2], said
    assert "looplm: error: `trainer.strategy` must be ddp_find_unused_parameters_true" in said
    assert "Traceback" not in said
