"""Curves of several runs side by side."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from looplm.cli import main
from looplm.commands.curve_files import is_outdated, read_curve
from looplm.errors import InputError


def _run(
    folder: Path, curve: dict[int, float], stage: str = "test", mean_depth: float | None = None, extra: str = ""
) -> Path:
    """Write what a run leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{stage},{depth},{value},{(1 + value) / 2}\n" for depth, value in curve.items())
    (folder / f"{stage}_curve.csv").write_text("split,depth,exact_match,token_accuracy\n" + rows + extra)
    summary = {stage: {"peak": max(curve.values())} | ({} if mean_depth is None else {"mean_depth": mean_depth})}
    (folder / f"{stage}_summary.json").write_text(json.dumps(summary))
    return folder


def _compare(*arguments: object) -> int:
    return main(["compare", *map(str, arguments)])


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of the error."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("looplm: error: ")
    return line


def test_table_csv_and_picture_hold_both_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = _run(tmp_path / "stars", {0: 0.0, 8: 0.75, 1024: 0.5}, mean_depth=5.9)
    second = _run(tmp_path / "fixed", {8: 1.0, 16: 0.125})
    assert _compare(first, second, "--output", tmp_path / "out") == 0

    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        rows = [(row["run"], int(row["depth"]), float(row["exact_match"])) for row in csv.DictReader(file)]
    assert rows == [
        ("stars", 0, 0.0),
        ("stars", 8, 0.75),
        ("stars", 1024, 0.5),
        ("fixed", 8, 1.0),
        ("fixed", 16, 0.125),
    ]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    assert table == [
        ["0", "0.0", ""],
        ["8", "75.0", "100.0"],
        ["16", "", "12.5"],
        ["1,024", "50.0", ""],
        ["peak", "75.0", "100.0"],
    ]


def test_long_curves_are_shown_in_part_and_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "long", {depth: depth / 300 for depth in range(300)})
    assert _compare(run, "--output", tmp_path / "out") == 0
    shown = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert shown == ["0", "1", "2", "4", "8", "10", "16", "32", "64", "100", "128", "256", "299", "peak"]
    assert len((tmp_path / "out" / "comparison.csv").read_text().splitlines()) == 301


def test_peak_is_that_of_the_whole_curve_not_of_the_rows_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path / "long", {depth: 0.875 if depth == 77 else 0.1 for depth in range(100)})
    assert _compare(run, "--output", tmp_path / "out") == 0
    assert "87.5" in capsys.readouterr().out


def test_test_curve_is_preferred_to_the_validation_curve(tmp_path: Path) -> None:
    _run(tmp_path / "run", {4: 0.25}, stage="val")
    assert read_curve(tmp_path / "run").exact_match == [0.25]
    _run(tmp_path / "run", {4: 0.5})
    assert read_curve(tmp_path / "run").exact_match == [0.5]


def test_further_evaluation_sets_are_left_out(tmp_path: Path) -> None:
    curve = read_curve(_run(tmp_path / "run", {4: 0.5}, extra="digits_5,4,0.0,0.1\n"))
    assert (curve.depths, curve.exact_match) == ([4], [0.5])


def test_curve_file_can_be_named_itself(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", {4: 0.5}, mean_depth=3.0)
    curve = read_curve(folder / "test_curve.csv")
    assert (curve.name, curve.depths, curve.mean_depth) == ("test_curve", [4], 3.0)


def test_run_without_a_curve_is_refused_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = _run(tmp_path / "good", {4: 0.5})
    (tmp_path / "untested").mkdir()
    assert _compare(good, tmp_path / "untested", "--output", tmp_path / "out") == 2
    assert f"{tmp_path / 'untested'} has no test_curve.csv or val_curve.csv" in _error(capsys)
    assert not (tmp_path / "out").exists()


def test_runs_of_the_same_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [_run(tmp_path / where / "stars", {4: 0.5}) for where in ("a", "b")]
    assert _compare(*runs, "--output", tmp_path / "out") == 2
    assert "must have different names, got ['stars', 'stars']" in _error(capsys)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"split,depth,exact_match,token_accuracy\n",
        b"depth,exact_match\n1,0.5\n",
        b"split,depth,exact_match,token_accuracy\ntest,four,0.5,0.5\n",
        b"split,depth,exact_match,token_accuracy\ntest,4,0.5\n",
        b"\x80\x81\x82",
    ],
)
def test_damaged_curve_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    path = _run(tmp_path / "run", {4: 0.5}) / "test_curve.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no curve") as caught:
        read_curve(tmp_path / "run")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"test": 3}'])
def test_damaged_summary_is_refused_by_its_path(tmp_path: Path, content: str) -> None:
    path = _run(tmp_path / "run", {4: 0.5}) / "test_summary.json"
    path.write_text(content)
    with pytest.raises(InputError, match="is no summary") as caught:
        read_curve(tmp_path / "run")
    assert str(path) in str(caught.value)


def test_output_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert _compare(_run(tmp_path / "run", {4: 0.5}), "--output", tmp_path / "file" / "out") == 2
    assert f"{str(tmp_path / 'file' / 'out')!r} must be a folder that can be written" in _error(capsys)


@pytest.mark.parametrize("argv", [[], ["run", "--out=x"], ["run", "--colour=red"]])
def test_bad_options_are_refused_in_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare(*argv) == 2
    assert "python -m looplm compare --help" in _error(capsys)


def test_a_comparison_can_be_compared_again(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, {0: 0.0, 8: value}) for name, value in (("one", 0.5), ("two", 1.0))]
    first, second = tmp_path / "first", tmp_path / "second"
    assert _compare(*runs, "--output", first) == 0
    assert _compare(first / "comparison.csv", "--output", second) == 0
    assert (second / "comparison.csv").read_bytes() == (first / "comparison.csv").read_bytes()


def test_damaged_comparison_is_refused_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "comparison.csv"
    path.write_text("run,depth,exact_match,token_accuracy\none,four,0.5,0.5\n")
    assert _compare(path, "--output", tmp_path / "out") == 2
    assert f"{path} is no table of curves" in _error(capsys)


def _grade(run: Path, accuracy: dict[str, dict[int, float]]) -> Path:
    lines = [f"{name},{d},{v},{v - 0.1},{v + 0.1}\n" for name, curve in accuracy.items() for d, v in curve.items()]
    (run / "test_graded.csv").write_text("source,depth,accuracy,low,high\n" + "".join(lines))
    return run


def test_graded_answers_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stars = _grade(_run(tmp_path / "stars", {1: 0.5}), {"easy": {2: 0.75, 1: 0.5}, "hard": {1: 0.25}})
    fixed = _grade(_run(tmp_path / "fixed", {1: 0.5}), {"easy": {1: 0.125}})
    plain = _run(tmp_path / "plain", {1: 0.5})
    assert _compare(stars, fixed, plain, "--output", tmp_path / "out") == 0
    with (tmp_path / "out" / "graded.csv").open(newline="") as file:
        rows = [(row["run"], row["source"], int(row["depth"]), float(row["accuracy"])) for row in csv.DictReader(file)]
    assert rows == [
        ("stars", "easy", 1, 0.5),
        ("stars", "easy", 2, 0.75),
        ("stars", "hard", 1, 0.25),
        ("fixed", "easy", 1, 0.125),
    ]
    assert (tmp_path / "out" / "graded.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert [cell.strip() for cell in shown.splitlines()[-4].split("│")[1:-1]] == ["1", "50.0", "25.0", "12.5"]
    assert _compare(plain, "--output", tmp_path / "other") == 0
    assert not (tmp_path / "other" / "graded.csv").exists()


def test_damaged_graded_file_is_refused_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "run", {1: 0.5})
    (run / "test_graded.csv").write_text("source,depth\nx,one\n")
    assert _compare(run, "--output", tmp_path / "out") == 2
    assert "test_graded.csv has no graded accuracy by depth" in _error(capsys)


def test_a_curve_older_than_the_weights_is_said_to_be_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path / "run", {1: 0.5, 4: 1.0})
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    for age, told in ((-60, ""), (60, f"looplm: warning: {run} was trained again after its `test`")):
        now = (run / "test_curve.csv").stat().st_mtime
        os.utime(checkpoint, (now + age, now + age))
        assert _compare(run, "--output", tmp_path / "out") == 0
        err = capsys.readouterr().err
        assert err.startswith(told)
        assert bool(err) == bool(told) == is_outdated(run)


def test_a_csv_of_something_else_is_refused_by_the_column_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("split,rule\ntrain,kl\n")
    assert _compare(other) == 2
    assert f"{other} is no curve: it has no column 'depth'" in _error(capsys)
