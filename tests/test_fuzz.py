"""Whatever a config says, a run trains a finite step or ends in one clear line with exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import TINY, merge

from looplm.cli import main

_NUMBER = st.sampled_from([0, 1, 2, 3, 4, 7, 8, -1, 0.5, 1e9, "many", None, True, [1], {"a": 1}])


def _object(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


_DEPTHS = st.one_of(
    st.builds(lambda n: _object("FixedDepth", depth=n), st.integers(-1, 4)),
    st.builds(lambda a, b: _object("UniformDepth", min_depth=a, max_depth=b), st.integers(0, 3), st.integers(0, 5)),
    st.builds(lambda r: _object("PoissonDepth", rate=r, max_depth=5), st.sampled_from([-1.0, 0.0, 0.5, 3.0])),
    st.builds(lambda s: _object("LogNormalDepth", sigma=s, max_depth=5), st.sampled_from([-1.0, 0.0, 0.5])),
    st.sampled_from([_object("NoSuchDepth"), _object("FixedDepth", deep=1), None, 3]),
)
_PENALTIES = st.one_of(
    st.builds(
        lambda q, m, n, f: _object("JacobianPenalty", quantity=q, method=m, num_iterations=n, fraction=f),
        st.sampled_from(["mean_gain", "spectral_radius", "spectral_norm", "entropy"]),
        st.sampled_from(["auto", "jvp", "vjp", "finite_difference", "guess"]),
        st.sampled_from([0, 1, 2, 3]),
        st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    ),
    st.builds(lambda margin: _object("SettlingPenalty", margin=margin), st.sampled_from([-1.0, 0.0, 0.4])),
    st.sampled_from([_object("LastStepPenalty"), _object("StarsReleasePenalty"), None, _object("NoSuchPenalty")]),
)
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model.config.width": st.sampled_from([8, 16, 15, 0, -8, "wide"]),
    "model.config.num_heads": st.sampled_from([1, 2, 3, 0]),
    "model.config.num_kv_heads": st.sampled_from([None, 1, 2, 5]),
    "model.config.ffn_width": st.sampled_from([8, 32, 0]),
    "model.config.num_prelude_layers": st.integers(-1, 2),
    "model.config.num_core_layers": st.integers(-1, 2),
    "model.config.num_coda_layers": st.integers(-1, 2),
    "model.config.norm_placement": st.sampled_from(
        ["pre_norm", "post_norm", "sandwich_branch", "sandwich_dual", "middle"]
    ),
    "model.config.norm_type": st.sampled_from(["layer_norm", "rms_norm", "simple_norm", "batch_norm"]),
    "model.config.positions": st.sampled_from(["learned", "rotary", "none"]),
    "model.config.activation": st.sampled_from(["gelu", "swiglu", "relu"]),
    "model.config.input_injection": st.sampled_from(["none", "add", "linear", "diagonal", "concat"]),
    "model.config.state_init": st.sampled_from(["embedding", "normal", "zeros", "ones"]),
    "model.config.dropout": st.sampled_from([0.0, 0.3, 1.0, -0.1]),
    "model.config.loop_norm": st.booleans(),
    "model.config.tie_embeddings": st.booleans(),
    "model.config.exit_gate": st.booleans(),
    "model.objective.depth_sampler": _DEPTHS,
    "model.objective.penalty": _PENALTIES,
    "model.objective.penalty_weight": st.sampled_from([0.0, 0.1, 1.0, 1.5, -1.0]),
    "model.objective.penalty_ramp_steps": st.sampled_from([0, 2, -1]),
    "model.objective.penalty_start_step": st.sampled_from([0, 1, -1]),
    "model.objective.spare_unlabelled": st.booleans(),
    "model.compile_backend": st.sampled_from([None, "aot_eager", "fastest"]),
    "model.objective.backprop_loops": st.sampled_from([None, 1, 3, 0]),
    "model.objective.checkpoint_loops": st.sampled_from([None, 1, 2, "sqrt", 0, "all"]),
    "model.lr_schedule.warmup_steps": st.sampled_from([0, 2, -1]),
    "model.val_depths": st.sampled_from([[1], [0, 2], [], [2, 1], 3]),
    "model.seed": st.sampled_from([1, "one"]),
    "trainer.accumulate_grad_batches": st.sampled_from([1, 2, 0, "x"]),
    "trainer.gradient_clip_val": st.sampled_from([None, 0.5, "x"]),
    "trainer.precision": st.sampled_from(["32-true", "bf16-mixed", "bf16-true", "64-true", "8-bit"]),
    "trainer.max_steps": st.sampled_from([1, 2, -3, "x"]),
    "guard.max_in_a_row": st.sampled_from([1, 5, 0]),
    "checkpoint.save_top_k": st.sampled_from([1, -1, 0, -5]),
    "data.init_args.batch_size": st.sampled_from([1, 3, 0, -1]),
    "data.init_args.min_digits": st.integers(0, 3),
    "data.init_args.operations": st.sampled_from([["+"], ["+", "-", "*"], [], ["/"], "+"]),
    "data.init_args.reverse_answer": st.booleans(),
    "modle.config.width": _NUMBER,
    "model.config.widht": _NUMBER,
    "trainer.max_stepz": _NUMBER,
}
_OVERRIDES = st.lists(st.sampled_from(sorted(_FIELDS)), min_size=1, max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: _FIELDS[name] for name in names})
)


def _call(argv: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(argv)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, errors.getvalue()


def _call_process(argv: list[str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "looplm", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stderr


def _check_refusal(errors: str) -> None:
    lines = [line for line in errors.splitlines() if line.startswith("looplm: error: ")]
    assert len(lines) == 1, errors
    assert errors.endswith(lines[0] + "\n"), errors
    assert "Traceback" not in errors


def _check(overrides: dict[str, Any], call: Callable[[list[str]], tuple[int, str]]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        config = folder / "config.yaml"
        short = merge(TINY, {"trainer.max_steps": 1, "trainer.limit_val_batches": 0, "trainer.logger": False})
        config.write_text(yaml.safe_dump(merge(short, overrides)), encoding="utf-8")
        argv = ["fit", "--config", str(config), f"--trainer.default_root_dir={folder / 'run'}"]
        code = 0
        if call is _call:  # a process takes its time
            code, errors = call([*argv, "--print_config"])
            assert code in (0, 2), errors
            if code == 2:
                _check_refusal(errors)
        trained, errors = call(argv)
        assert trained in (0, 2), errors
        # What cannot be printed cannot be trained.
        assert trained == 2 or code == 0, errors
        if trained == 2:
            _check_refusal(errors)
            return
        saved = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] >= 1
        assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
        assert saved["callbacks"]["NonFiniteGuard"] == {"skipped_steps": 0, "in_a_row": 0}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fuzz(num_cases: int, call: Callable[[list[str]], tuple[int, str]] = _call) -> None:
    @settings(
        max_examples=num_cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    @given(_OVERRIDES)
    def cases(overrides: dict[str, Any]) -> None:
        _check(overrides, call)

    cases()


def test_random_configs_train_or_are_refused_in_one_line() -> None:
    _fuzz(12)


def test_random_configs_do_so_in_processes_of_their_own() -> None:
    _fuzz(10, _call_process)


@pytest.mark.slow
def test_500_random_configs_train_or_are_refused_in_one_line() -> None:
    _fuzz(500)
