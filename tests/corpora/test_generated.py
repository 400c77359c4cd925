"""A corpus that is made when it is asked for: the generator's rows, once, under the name of its options."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from looplm.corpora.generated import generated_file, is_generated
from looplm.corpora.sources import Source, load_rows
from looplm.corpora.word_problems import word_problems
from looplm.errors import InputError

PATH = "word_problems?split=val&num_rows=7&max_steps=2&seed=3"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def test_the_rows_are_the_generators_and_made_once() -> None:
    path = generated_file(PATH)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [problem.row() for problem in word_problems(3, "val", 7, max_steps=2)]
    before = path.stat().st_mtime_ns
    assert generated_file(PATH) == path
    assert path.stat().st_mtime_ns == before
    # The order of the options is no difference; a value is.
    assert generated_file("word_problems?seed=3&max_steps=2&num_rows=7&split=val") == path
    assert generated_file(PATH.replace("seed=3", "seed=4")) != path


def test_a_source_reads_them_like_any_file(tmp_path) -> None:
    source = Source(path=PATH, final="final")
    assert source.label == "word_problems"
    rows = load_rows(source, tmp_path / "sources")
    assert rows["final"] == [problem.final for problem in word_problems(3, "val", 7, max_steps=2)]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("word_problems?rows=3", "the options are"),
        ("word_problems?num_rows=many", "integers"),
        ("word_problems?split=dev&num_rows=2", "dev"),
        ("word_problems?max_steps=99&num_rows=2", "99"),
    ],
)
def test_a_wrong_option_is_one_line(path: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Source(path=path)


def test_only_its_own_name_is_a_generator() -> None:
    assert is_generated("word_problems")
    assert not any(
        map(is_generated, ("word_problems.jsonl", "data/word_problems_train.jsonl.gz", "owner/word_problems"))
    )


def test_two_processes_at_once_leave_one_whole_file(tmp_path) -> None:
    code = f"from looplm.corpora.generated import generated_file; print(generated_file({PATH!r}))"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].decode().strip() for process in both}
    assert len(paths) == 1
    folder = tmp_path / "looplm" / "generated"
    assert [str(path) for path in folder.iterdir()] == list(paths)
    assert len(next(folder.iterdir()).read_text().splitlines()) == 7
