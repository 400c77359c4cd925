"""The entry of the benchmarks on its cheapest group."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main

ROOT = Path(__file__).parents[2]


def test_the_entry_prints_and_writes_what_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", "--only", "data", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    content = json.loads(file.read_text(encoding="utf-8"))
    (row,) = content["rows"]
    assert (row["group"], row["target"], row["bound"], row["unit"]) == ("data", 2.0, "at most", "%")
    measured = row["measured"]
    assert 0 < measured["low"] <= measured["value"] <= measured["high"]
    assert row["is_met"] == (measured["value"] <= 2.0)
    assert done.returncode == (0 if row["is_met"] else 1), done.stderr
    assert done.stdout.startswith("pass" if row["is_met"] else "MISS")


def test_a_group_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--only", "nonsense"])
    assert caught.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
