"""The rows of the GPU, computed by a CPU at a small size."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

import pytest
import torch

from looplm.config import LoopedConfig
from looplm.flops import penalty_flops, training_flops
from looplm.stability.penalty import JacobianPenalty

from . import __main__ as entry
from .gpu import (
    GenerationSize,
    StepSize,
    StepTimes,
    first_that_fits,
    generation_row,
    gpu_rows,
    mfu_row,
    peak_flops,
    run_row,
    step_times,
)
from .timing import Row

CPU = torch.device("cpu")
SMALL = replace(LoopedConfig.ouro_1_4b(), vocab_size=19, width=32, num_heads=2, ffn_width=48, num_core_layers=2)
STEP = StepSize(config=SMALL, batch_size=2, length=8, num_loops=3, backend="aot_eager")


def _is_sound(row: Row) -> bool:
    measured = row.measured
    return math.isfinite(measured.high) and 0 < measured.low <= measured.value <= measured.high


@pytest.mark.parametrize("checkpoint_loops", [None, 1])
@pytest.mark.parametrize(("with_penalty", "target"), [(False, 45.0), (True, 40.0)])
def test_utilisation_is_flops_by_time_and_peak(with_penalty: bool, target: float, checkpoint_loops: int | None) -> None:
    size = replace(STEP, checkpoint_loops=checkpoint_loops)
    times = step_times(CPU, [size], with_penalty, 3)
    peak = peak_flops(CPU, 64, 2, 2)
    assert peak > 0
    row = mfu_row(times, peak)
    flops = training_flops(SMALL, 2, 8, 3)  # nothing for what a checkpoint computes again
    if with_penalty:
        flops += penalty_flops(SMALL, 2, 8, JacobianPenalty(fraction=0.5))
    assert len(times.seconds) == 3
    assert row.measured.value == pytest.approx(100 * flops / (median(times.seconds) * peak))
    assert (row.target, row.bound, row.unit) == (target, "at least", "%")
    assert _is_sound(row)
    assert ("penalty" in row.what, "checkpoint" in row.what) == (with_penalty, checkpoint_loops is not None)


def test_utilisation_of_made_up_times() -> None:
    flops = STEP.flops(with_penalty=False)
    times = StepTimes(size=STEP, with_penalty=False, seconds=[1.0, 4.0, 2.0])
    row = mfu_row(times, peak=float(flops))
    assert row.measured.value == pytest.approx(50.0)
    assert row.is_met
    assert not mfu_row(times, peak=2.0 * flops).is_met


def test_the_penalty_adds_the_flops_of_one_sequence() -> None:
    added = {
        size: replace(STEP, batch_size=size).flops(True) - replace(STEP, batch_size=size).flops(False)
        for size in (2, 3, 8)
    }
    assert len(set(added.values())) == 1


def test_a_size_that_does_not_fit_gives_way_to_the_next() -> None:
    tried = []

    def prepare(size: int) -> str:
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError
        return f"prepared {size}"

    assert first_that_fits(prepare, [8, 4, 2, 1]) == (2, "prepared 2")
    assert tried == [8, 4, 2]
    with pytest.raises(torch.OutOfMemoryError):
        first_that_fits(prepare, [8, 4])


def test_a_run_is_timed_in_minutes() -> None:
    small = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.num_sanity_val_steps=0"]
    small += ["--model.config.width=16", "--model.config.num_heads=2", "--model.config.ffn_width=32"]
    small += ["--model.val_depths=[1,2]", "--model.objective.penalty_start_step=0"]
    small += ["--data.batch_size=8", "--data.num_val=16"]
    row = run_row(CPU, *small)
    assert (row.target, row.bound, row.unit) == (4.0, "at most", "min")
    assert _is_sound(row)
    assert row.is_met
    assert "--trainer.max_steps=2" in row.what


def test_a_run_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"code 2: .*trainer\.max_steps"):
        run_row(CPU, "--trainer.max_steps=none_at_all")


def test_generation_with_a_cache_against_without() -> None:
    config = replace(SMALL, norm_placement="sandwich_dual", loop_norm=False, exit_gate=False)
    size = GenerationSize(config=config, num_rows=3, num_loops=2, prompt_length=4, new_tokens=5)
    row = generation_row(CPU, size, 3)
    assert (row.target, row.bound, row.unit) == (10.0, "at least", "x faster")
    assert _is_sound(row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_without_cuda_the_group_is_refused_by_name_and_else_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(["--quick", "--only", "gpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err == "python -m tests.benchmarks: error: the group `gpu` needs a CUDA device; there is none here\n"
    )
    run: list[str] = []

    def recorded(name: str) -> entry.Group:
        def rows(num_rounds: int) -> list[Row]:
            run.append(name)
            return []

        return rows

    monkeypatch.setattr(entry, "GROUPS", {name: recorded(name) for name in entry.GROUPS})
    assert entry.GROUPS.keys() >= {"gpu", "data"}
    assert entry.main([]) == 0
    assert run == [name for name in entry.GROUPS if name != "gpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.slow
def test_the_rows_on_a_gpu() -> None:
    rows = list(gpu_rows(3))
    assert len(rows) == 4
    assert all(_is_sound(row) for row in rows)
