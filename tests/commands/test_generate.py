"""`generate` writes whole files, the same every time; the shipped sample is what it wrote."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from datasets import load_dataset

from looplm.cli import main
from looplm.commands.generate import encode_rows
from looplm.corpora.word_problems import word_problems

DATA = Path(__file__).parents[2] / "data"
SHIPPED = [("train", 20_000), ("test", 1_000)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_file_is_the_same_every_time_and_datasets_reads_it(name: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert main(["generate", str(tmp_path / folder / name), "--num_rows", "30", "--split", "val", "--seed=4"]) == 0
    first, second = (tmp_path / folder / name for folder in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == [name]
    rows = load_dataset("json", data_files=str(first), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["question", "answer", "final", "steps"]
    assert rows.to_list() == [problem.row() for problem in word_problems(4, "val", 30)]


def test_range_of_steps_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    assert main(["generate", str(out), "--num_rows=40", "--min_steps=2", "--max_steps=3"]) == 0
    steps = Counter(json.loads(line)["steps"] for line in out.read_text().splitlines())
    assert steps == {2: 20, 3: 20}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl", "--num_rows=0"], "`--num_rows` must be >= 1, got 0"),
        (["a.csv"], "`OUT` must end in .jsonl or .jsonl.gz, got 'a.csv'"),
        (["a.jsonl", "--split=dev"], "dev"),
        (["a.jsonl", "--min_steps=5", "--max_steps=2"], "1 <= min <= max <= 6, got 5 and 2"),
        (["/dev/null/a.jsonl"], "`OUT` '/dev/null/a.jsonl' cannot be written: "),
        ([], "OUT"),
    ],
)
def test_wrong_option_is_one_line_and_leaves_no_file(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("split", "num_rows"), SHIPPED)
def test_shipped_sample_is_what_the_generator_writes(split: str, num_rows: int, tmp_path: Path) -> None:
    path = DATA / f"word_problems_{split}.jsonl.gz"
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert len(rows) == num_rows == len(set(rows["question"]))
    by_steps = Counter(rows["steps"])
    assert set(by_steps) == set(range(1, 7))
    assert max(by_steps.values()) - min(by_steps.values()) <= 1
    expected = islice(word_problems(2026, split, num_rows), 60)
    assert rows.select(range(60)).to_list() == [problem.row() for problem in expected]


@pytest.mark.slow
@pytest.mark.parametrize(("split", "num_rows"), SHIPPED)
def test_shipped_sample_is_the_generators_to_the_last_row(split: str, num_rows: int) -> None:
    written = encode_rows(word_problems(2026, split, num_rows), is_compressed=False)
    assert gzip.decompress((DATA / f"word_problems_{split}.jsonl.gz").read_bytes()) == written


def test_checksums_of_data_are_those_of_its_readme() -> None:
    table = re.findall(r"^\| `([^`]+)` \| ([0-9a-f]{64}) \|$", (DATA / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in table) == sorted(path.name for path in DATA.iterdir() if path.suffix != ".md")
    for name, checksum in table:
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == checksum, name
