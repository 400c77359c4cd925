"""Several configs, each trained once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from looplm.cli import main
from looplm.commands.runs import run_stamp


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let ``sweep`` run its fits and tests in this process (a new one takes seconds to start); return the calls."""
    calls: list[list[str]] = []

    class Ended:
        def __init__(self, arguments: list[str], **options: Any) -> None:
            calls.append(arguments)
            self.code = main(arguments)

        def poll(self) -> int:
            return self.code

    monkeypatch.setattr("looplm.commands.sweep._start", Ended)
    return calls


def _commands(calls: list[list[str]]) -> list[str]:
    commands = [call[0] for call in calls]
    calls.clear()
    return commands


def _checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def test_finished_runs_are_kept_and_changed_ones_run_again(
    tmp_path: Path, write_config: Any, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    first, second = write_config("first"), write_config("second", seed_everything=1)
    sweep = ["sweep", str(first), str(second), f"--root={root}"]

    assert main(sweep) == 0
    assert _commands(in_process) == ["fit", "test"] * 2
    written = {"comparison.csv", "comparison.html", "comparison.png", "escapes.png", "robustness.csv"}
    assert {path.name for path in (root / "compare").iterdir()} == written
    kept = [path.stat().st_mtime_ns for path in (_checkpoint(root / "first"), _checkpoint(root / "second"))]

    assert main(sweep) == 0
    assert _commands(in_process) == []
    assert "kept" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in (_checkpoint(root / "first"), _checkpoint(root / "second"))] == kept

    # A changed config concerns its own run alone.
    write_config("second", seed_everything=2)
    assert main(sweep) == 0
    assert [call[call.index("--config") + 1] for call in in_process] == [str(second)] * 2
    _commands(in_process)
    assert _checkpoint(root / "first").stat().st_mtime_ns == kept[0]
    assert _checkpoint(root / "second").stat().st_mtime_ns != kept[1]

    # A changed option concerns every run, and begins anew: nothing is left of the old one.
    assert main([*sweep, "--trainer.max_steps=2"]) == 0
    assert _commands(in_process) == ["fit", "test"] * 2
    assert torch.load(_checkpoint(root / "first"), weights_only=True)["global_step"] == 2
    assert sorted(path.name for path in (root / "first" / "checkpoints").iterdir()) == [
        "epoch=0-step=2.ckpt",
        "last.ckpt",
    ]


def test_stamp_depends_on_config_and_options(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("a: 1\n")
    stamps = [run_stamp(config, []), run_stamp(config, ["--x=1"]), run_stamp(config, ["--x=1", "--y"])]
    config.write_text("a: 2\n")
    stamps.append(run_stamp(config, []))
    assert len({stamp["config_sha256"] for stamp in stamps}) == 4
    config.write_text("a: 1\n")
    assert run_stamp(config, []) == stamps[0]


def test_killed_fit_continues_from_its_checkpoint(
    tmp_path: Path, write_config: Any, in_process: list[list[str]]
) -> None:
    slow = {"class_path": "UniformDepth", "init_args": {"min_depth": 30, "max_depth": 60}}
    config = write_config(
        "slow",
        model__objective={"depth_sampler": slow},
        trainer__max_steps=16,
        trainer__val_check_interval=1000,
        checkpoint__every_n_train_steps=2,
    )
    root = tmp_path / "runs"
    sweep = ["sweep", str(config), f"--root={root}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    last = _checkpoint(root / "slow")
    process = subprocess.Popen(
        [sys.executable, "-m", "looplm", *sweep],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # The sweep and the fit that it started.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = torch.load(last, weights_only=True)["global_step"]
    assert 0 < reached < 16
    assert not (root / "slow" / "finished.json").exists()

    assert main(sweep) == 0
    assert "--ckpt_path=last" in in_process[0]
    assert _commands(in_process) == ["fit", "test"]
    assert torch.load(last, weights_only=True)["global_step"] == 16
    assert (root / "slow" / "finished.json").is_file()
    assert (root / "slow" / "test_curve.csv").is_file()


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("looplm: error: ")]
    return line


def test_directory_that_sweep_did_not_make_is_left_alone(
    tmp_path: Path, write_config: Any, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "runs" / "tiny" / "thesis.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")
    assert main(["sweep", str(write_config()), f"--root={tmp_path / 'runs'}"]) == 2
    assert "was not made by `sweep`" in _error(capsys)
    assert foreign.read_text() == "years of work"
    assert in_process == []


def test_directories_are_looked_at_before_the_first_run_starts(
    tmp_path: Path, write_config: Any, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    (root / "second").mkdir(parents=True)
    (root / "second" / "config.yaml").touch()  # which `fit` leaves
    assert main(["sweep", str(write_config("first")), str(write_config("second")), f"--root={root}"]) == 2
    assert f"'{root / 'second'}' exists and was not made by `sweep`; name another `--root`." in _error(capsys)
    assert in_process == []
    assert not (root / "first").exists()


def test_failing_run_ends_the_sweep_and_is_not_taken_for_finished(
    tmp_path: Path, write_config: Any, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    bad, good = write_config("bad", model__config__num_heads=3), write_config("good")
    assert main(["sweep", str(bad), str(good), f"--root={root}"]) == 2
    assert "`num_heads` must divide" in capsys.readouterr().err
    assert _commands(in_process) == ["fit"]
    assert not (root / "bad" / "finished.json").exists()
    write_config("bad")
    assert main(["sweep", str(bad), str(good), f"--root={root}"]) == 0


def test_configs_of_the_same_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "a/x.yaml", "b/x.yaml", f"--root={tmp_path / 'runs'}"]) == 2
    assert "configs must have different names, got ['x', 'x']" in _error(capsys)


def test_missing_config_is_refused_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(tmp_path / "no.yaml"), f"--root={tmp_path / 'runs'}"]) == 2
    assert f"config {str(tmp_path / 'no.yaml')!r} cannot be read" in _error(capsys)
    assert not (tmp_path / "runs").exists()


def test_root_that_cannot_be_written_is_refused(
    tmp_path: Path, write_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["sweep", str(write_config()), f"--root={tmp_path / 'file' / 'runs'}"]) == 2
    assert "must be a folder that can be written" in _error(capsys)
