"""A study: a base with overlays, seeds, several runs at a time, rows, and kills at any moment."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from looplm.cli import main
from looplm.commands.curve_files import read_curve
from looplm.commands.curves import Curve
from looplm.commands.rows import append_row, read_rows
from looplm.commands.runs import expand_runs, is_finished, prepare_directory, run_stamp, write_stamp
from looplm.errors import InputError


@pytest.fixture
def study(tmp_path: Path, write_config: Any) -> Path:
    """A base that trains for a second or two, and two overlays."""
    folder = tmp_path / "study"
    folder.mkdir()
    sampler = {"class_path": "UniformDepth", "init_args": {"min_depth": 10, "max_depth": 20}}
    write_config(
        "study/base",
        model__objective={"depth_sampler": sampler},
        trainer__max_steps=30,
        trainer__val_check_interval=30,
        checkpoint__every_n_train_steps=5,
    )
    fixed = {"class_path": "FixedDepth", "init_args": {"depth": 15}}
    overlays = {"fixed": {"objective": {"depth_sampler": fixed}}, "rms": {"config": {"norm_type": "rms_norm"}}}
    for name, model in overlays.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"model": model}))
    return folder


def _expand(*arguments: Path, **options: Any) -> list[Any]:
    return expand_runs(arguments, root=Path("root"), **{"options": (), **options})


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Which runs there are


def test_directory_is_its_base_with_each_overlay(study: Path, write_config: Any) -> None:
    runs = _expand(study, write_config("alone"), options=("--x=1",))
    assert [(run.name, run.configs, run.options) for run in runs] == [
        ("fixed", (study / "base.yaml", study / "fixed.yaml"), ("--x=1",)),
        ("rms", (study / "base.yaml", study / "rms.yaml"), ("--x=1",)),
        ("alone", (study.parent / "alone.yaml",), ("--x=1",)),
    ]
    assert runs[0].arguments == [
        "--config",
        str(study / "base.yaml"),
        "--config",
        str(study / "fixed.yaml"),
        "--x=1",
        "--trainer.default_root_dir=root/fixed",
    ]


def test_seeds_multiply_runs_and_are_options_of_theirs(study: Path) -> None:
    runs = _expand(study, seeds=[0, 7])
    assert [run.name for run in runs] == ["fixed_seed0", "rms_seed0", "fixed_seed7", "rms_seed7"]
    assert runs[2].options == ("--seed_everything=7",)
    assert len({run.stamp["config_sha256"] for run in runs}) == 4


def test_only_keeps_configs_or_single_runs(study: Path) -> None:
    names = [run.name for run in _expand(study, seeds=[0, 1], only=["rms", "fixed_seed1"])]
    assert names == ["rms_seed0", "fixed_seed1", "rms_seed1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fixed", "stars"], "`--only` must name some of ['fixed', 'rms'], got ['stars']"),
        (["--seeds", "1", "1"], "`--seeds` must be different integers >= 0, got [1, 1]"),
        (["--seeds", "one"], "invalid int value: 'one'"),
        (["--jobs", "0"], "`--jobs` must be >= 1, got 0"),
        (["--jbos", "2"], "unknown option --jbos; did you mean --jobs?"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    study: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = study.parent / "runs"
    assert main(["sweep", str(study), f"--root={root}", *arguments]) == 2
    assert message in _error(capsys)
    assert not root.exists()


@pytest.mark.parametrize("missing", ["base", "overlays"])
def test_directory_without_base_or_overlay_is_refused(
    study: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in study.iterdir():
        if (path.name == "base.yaml") == (missing == "base"):
            path.unlink()
    assert main(["sweep", str(study)]) == 2
    assert "must hold base.yaml and at least one overlay" in _error(capsys)


def test_stamp_covers_every_config_and_where_one_ends(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"

    def digest(a: str, b: str) -> str:
        first.write_text(a)
        second.write_text(b)
        return run_stamp([first, second], [])["config_sha256"]

    texts = [("a: 1\n", "b: 1\n"), ("a: 2\n", "b: 1\n"), ("a: 1\n", "b: 2\n"), ("a: 1\nb: 1\n", "")]
    assert len({digest(*pair) for pair in texts}) == 4


# What a kill can leave behind


def _prepared(study: Path) -> tuple[Any, dict[str, str], Path]:
    root = study.parent / "runs"
    (run,) = expand_runs([study], root=root, options=(), only=["rms"])
    scratch = root / ".sweep"
    scratch.mkdir(parents=True)
    prepare_directory(run, run.stamp, scratch)
    return run, run.stamp, scratch


def test_directory_has_its_stamp_from_its_first_moment(study: Path) -> None:
    run, stamp, _ = _prepared(study)
    assert json.loads((run.directory / "started.json").read_text()) == stamp
    assert not is_finished(run, stamp)


def test_finished_needs_stamp_and_curve(study: Path) -> None:
    run, stamp, _ = _prepared(study)
    write_stamp(run.directory / "finished.json", stamp)
    assert not is_finished(run, stamp)
    (run.directory / "test_curve.csv").touch()
    assert is_finished(run, stamp)
    (run.directory / "finished.json").write_text(json.dumps(stamp)[:-5])
    assert not is_finished(run, stamp)


def test_half_made_and_half_removed_directories_are_cleared(study: Path) -> None:
    run, stamp, scratch = _prepared(study)
    for name in ("rms.new", "rms.old"):
        (scratch / name).mkdir()
        (scratch / name / "junk").touch()
    (run.directory / "of_the_former_config").touch()
    prepare_directory(run, {**stamp, "config_sha256": "another"}, scratch)
    assert [path.name for path in run.directory.iterdir()] == ["started.json"]
    assert list(scratch.iterdir()) == []


# Rows

_CURVE = Curve(name="a", depths=[0, 4], exact_match=[0.0, 1.0], token_accuracy=[0.5, 1.0], mean_depth=4.0)
_STAMP = {"config_sha256": "c", "code_sha256": "d", "version": "1"}


def _append(path: Path, number: int) -> bool:
    return append_row(path, Curve(**{**vars(_CURVE), "name": f"run{number}"}), _STAMP, "0")


def test_row_holds_the_curve_and_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "data" / "study.csv"
    dynamics = {"depth": [1.0, 4.0], "spectral_radius": [0.9, float("nan")]}
    curve = Curve(**{**vars(_CURVE), "dynamics": dynamics})
    assert append_row(path, curve, _STAMP, "3")
    assert not append_row(path, curve, _STAMP, "3")
    assert append_row(path, curve, {**_STAMP, "config_sha256": "e"}, "3")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["config_sha256"] for row in rows] == ["c", "e"]
    assert (rows[0]["seed"], rows[0]["depths"], rows[0]["exact_match"]) == ("3", "0 4", "0 1")
    read = read_rows(path)["a", "c"]
    assert (read.depths, read.exact_match, read.mean_depth) == (curve.depths, curve.exact_match, 4.0)
    assert read.deepest("spectral_radius") == 0.9


def test_rows_of_writers_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    with ProcessPoolExecutor(4) as pool:
        added = list(pool.map(_append, [path] * 60, [*range(30), *range(30)]))
    assert sum(added) == 30
    assert {name for name, _ in read_rows(path)} == {f"run{number}" for number in range(30)}
    assert len(path.read_text().splitlines()) == 31


def test_row_after_a_missing_line_end_is_a_row_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    _append(path, 0)
    path.write_text(path.read_text().rstrip("\n"))
    _append(path, 1)
    assert len(read_rows(path)) == 2


@pytest.mark.parametrize("content", ["thesis\n", "run,depth\na,1\n"])
def test_file_that_is_no_rows_file_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "study.csv"
    path.write_text(content)
    with pytest.raises(InputError, match="must have the columns run, seed"):
        _append(path, 0)
    assert path.read_text() == content


def test_run_with_a_row_is_not_trained_again(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, rows = study.parent / "runs", study.parent / "study.csv"
    for run in expand_runs([study], root=root, options=(), seeds=[0, 1]):
        append_row(rows, Curve(**{**vars(_CURVE), "name": run.name}), run.stamp, "0")
    before = rows.read_bytes()
    assert main(["sweep", str(study), f"--root={root}", "--seeds", "0", "1", "--rows", str(rows)]) == 0
    assert "has a row of fixed_seed1 with this config; not trained again" in capsys.readouterr().out
    assert rows.read_bytes() == before
    assert sorted(path.name for path in root.iterdir()) == ["compare"]
    assert (root / "compare" / "comparison.html").is_file()


# Kills, of real processes

_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _sweep(study: Path, *options: str) -> list[str]:
    root = study.parent / "runs"
    return [sys.executable, "-m", "looplm", "sweep", str(study), f"--root={root}", *options]


def _start(argv: list[str]) -> subprocess.Popen[bytes]:
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(argv, env=_ENVIRONMENT, start_new_session=True, **quiet)


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the sweep ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_free(lock: Path) -> bool:
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_repeat_no_finished_run(study: Path) -> None:
    root, rows = study.parent / "runs", study.parent / "study.csv"
    argv = _sweep(study, "--seeds", "1", "--jobs", "2", "--rows", str(rows))
    finished: dict[Path, int] = {}
    rng = random.Random(time.time_ns())
    # The kills fall into the start, the fits, the tests, or what follows them.
    for seconds in (rng.uniform(0, 1), rng.uniform(3, 12)):
        process = _start(argv)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for path, made in finished.items():
            assert path.stat().st_mtime_ns == made, f"{path} was repeated"
        finished = {path: path.stat().st_mtime_ns for path in root.glob("*/finished.json")}
        # A row is written at once, but after its run: at most those just finished are still without one.
        assert {name for name, _ in read_rows(rows)} <= {path.parent.name for path in finished}
    done = subprocess.run(argv, capture_output=True, text=True, env=_ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    for path, made in finished.items():
        assert path.stat().st_mtime_ns == made, f"{path} was repeated"
    assert sorted(name for name, _ in read_rows(rows)) == ["fixed_seed1", "rms_seed1"]
    with rows.open(newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["1", "1"]
    for name in ("fixed_seed1", "rms_seed1"):
        assert read_curve(root / name).depths == [0, 2, 8]


def test_stopped_sweep_ends_its_runs_and_one_killed_alone_leaves_no_second_trainer(study: Path) -> None:
    root = study.parent / "runs"
    long = _sweep(study, "--jobs", "2", "--trainer.max_steps=100000", "--trainer.val_check_interval=100000")
    locks = [root / ".sweep" / f"{name}.lock" for name in ("fixed", "rms")]
    process = _start(long)
    for name in ("fixed", "rms"):
        _wait_for(root / name / "checkpoints" / "last.ckpt", process)
    assert not any(map(_is_free, locks))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert all(map(_is_free, locks))

    # Killed alone, a sweep leaves its runs behind: they hold the lock, and the next sweep waits for them.
    process = _start([*long, "--only", "rms"])
    while _is_free(locks[1]):
        time.sleep(0.05)
    time.sleep(1.0)
    process.kill()
    process.wait()
    assert not _is_free(locks[1])
    second = subprocess.Popen([*long, "--only", "rms"], env=_ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    assert "a process of another sweep works there; waiting for its end" in second.stdout.readline()
    second.terminate()
    assert second.wait(60) == 128 + signal.SIGTERM
    os.killpg(process.pid, signal.SIGKILL)


def test_failing_run_is_named_with_its_last_words_and_the_one_beside_it_finishes(
    study: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (study / "fixed.yaml").write_text("model: {config: {num_heads: 3}}\n")
    root = study.parent / "runs"
    assert main(["sweep", str(study), f"--root={root}", "--jobs=2", "--trainer.max_steps=2"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "ended with exit code 2" in line
    assert "`num_heads` must divide" in line
    assert (root / "rms" / "finished.json").is_file()
    assert not (root / "fixed" / "finished.json").exists()
