"""Every format gives the same rows, and what is wrong with a corpus is said in one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from sums import ROWS, write_lines

from looplm.corpora.rows import Fault, check_rows, question_key
from looplm.corpora.sources import Source, content_key, load_rows, read_batches
from looplm.errors import InputError


def _array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def _lines(path: Path) -> None:
    write_lines(path, ROWS)


def _zipped(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def _table() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


def _folder(path: Path) -> None:
    path.mkdir()
    _table().to_parquet(path / "train-00000-of-00001.parquet")
    _table().select(range(3)).to_parquet(path / "test-00000-of-00001.parquet")


FORMATS: dict[str, Callable[[Path], Any]] = {
    "rows.json": _array,
    "rows.jsonl": _lines,
    "rows.jsonl.gz": _zipped,
    "rows.csv": lambda path: _table().to_csv(path),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(_table().to_pandas().to_csv(index=False).encode())),
    "rows.tsv": lambda path: _table().to_csv(path, sep="\t"),
    "rows.parquet": lambda path: _table().to_parquet(path),
    "rows.arrow": lambda path: _arrow_file(path),
    "folder": _folder,
    "saved": lambda path: _table().save_to_disk(path),
    "saved_splits": lambda path: datasets.DatasetDict(train=_table(), test=_table().select([0])).save_to_disk(path),
}


def _arrow_file(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("streaming", [False, True], ids=["kept", "streamed"])
def test_every_format_gives_the_same_rows(name: str, streaming: bool, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    source = Source(path=str(tmp_path / name))
    rows = load_rows(source, tmp_path / "cache", streaming=streaming)
    read = [{part: row[part] for part in ("question", "answer")} for row in rows]
    assert read == ROWS
    assert source.label == name.split(".")[0]


def test_split_of_a_directory_and_part_of_a_file(tmp_path: Path) -> None:
    _folder(tmp_path / "folder")
    _lines(tmp_path / "rows.jsonl")
    assert len(load_rows(Source(path=str(tmp_path / "folder"), split="test"), tmp_path / "cache")) == 3
    assert len(load_rows(Source(path=str(tmp_path / "rows.jsonl"), split="train[:7]"), tmp_path / "cache")) == 7


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "broken JSON": ("a.jsonl", b'{"question":"a","answer":"b"}\n{"question":"a","ans\n', "line 2: no JSON: Unterm"),
    "broken array": ("a.json", b'[{"question":"a","answer":"b"},\n{"question"]', "line 2: no JSON"),
    "numbers": ("a.jsonl", b'{"question":"a","answer":"b"}\n3\n', "line 2: a row must be an object, got int"),
    "no UTF-8": ("a.jsonl", '{"question":"é","answer":"b"}\n'.encode("latin-1"), "line 1: no UTF-8"),
    "raw NUL": ("a.jsonl", b'{"question":"a\0","answer":"b"}\n', "line 1: no JSON: Invalid control character"),
    "no bytes": ("a.jsonl", b"", "the file is empty"),
    "only white space": ("a.jsonl", b"\n \n", "a.jsonl"),
    "another column": ("a.jsonl", b'{"question":"a","solution":"b"}\n', "column 'answer' is missing; the columns are"),
    "no gzip": ("a.jsonl.gz", b'{"question":"a","answer":"b"}\n', "a.jsonl.gz"),
    "no parquet": ("a.parquet", b"PAR1 not really", "a.parquet"),
    "unknown ending": ("a.xml", b"<a/>", "must end in one of"),
    "header alone": ("a.csv", b"question,answer\n", "a.csv"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("streaming", [False, True], ids=["kept", "streamed"])
def test_what_cannot_be_read_is_said_in_one_line(case: str, streaming: bool, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    source = Source(path=str(tmp_path / name))
    with pytest.raises(InputError) as caught:
        list(read_batches(source, load_rows(source, tmp_path / "cache", streaming=streaming), 10))
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="must be a file, a directory or a hub id"):
        load_rows(Source(path=str(tmp_path / "nowhere.jsonl")), tmp_path)
    _folder(tmp_path / "folder")
    with pytest.raises(InputError, match="'validation'"):
        load_rows(Source(path=str(tmp_path / "folder"), split="validation"), tmp_path)
    FORMATS["saved_splits"](tmp_path / "saved")
    with pytest.raises(InputError, match="the splits are"):
        load_rows(Source(path=str(tmp_path / "saved"), split="validation"), tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"openai/gsm8k .* cannot be read"):
        load_rows(Source(path="openai/gsm8k", subset="main"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "`path`"),
        ({"path": "x/y", "weight": 0.0}, "`weight` must be > 0"),
        ({"path": "x/y", "answer": None}, "needs a column `answer` or `final`"),
    ],
)
def test_source_checks_its_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**fields)


def test_option_without_effect_on_a_local_path_is_an_error(corpus_file: Path) -> None:
    for option in ({"revision": "main"}, {"subset": "main"}, {"split": "test"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            Source(path=str(corpus_file), **option)


def test_columns_may_be_patterns_and_final_answers_numbers() -> None:
    source = Source(path="x/y", question="{Body} {Question}", answer=None, final="Answer")
    batch = {
        "Body": ["A has 2.", "B {Question}", None],
        "Question": ["How many?", "Why?", "x"],
        "Answer": [2.0, 7, "x"],
    }
    rows = check_rows(source, batch)
    assert rows.question[:2] == ["A has 2. How many?", "B {Question} Why?"]
    assert rows.answer == rows.final == ["2.0", "7", "x"]
    assert rows.fault.tolist() == [Fault.NONE, Fault.NONE, Fault.EMPTY]


def test_each_fault_is_found_with_its_part() -> None:
    source = Source(path="x/y", final="final")
    batch = {
        "question": ["q", " \n", "q", "q\0", "q", ["q"]],
        "answer": ["a", "a", 3, "a", None, "a"],
        "final": ["1", "1", "1", "1", "1", "1"],
    }
    rows = check_rows(source, batch)
    assert rows.fault.tolist() == [Fault.NONE, Fault.EMPTY, Fault.NO_TEXT, Fault.NUL, Fault.EMPTY, Fault.NO_TEXT]
    assert rows.part.tolist() == [0, 0, 1, 0, 1, 0]


def test_malformed_lines_are_marked_where_they_are_to_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question":"a","answer":"b"}\n{"ques\n[1]\n\n{"question":"c","answer":"d","x":[1]}\n')
    source = Source(path=str(path))
    rows = load_rows(source, tmp_path / "cache", skip_malformed=True)
    checked = check_rows(source, rows[:])
    assert checked.fault.tolist() == [Fault.NONE, Fault.MALFORMED, Fault.MALFORMED, Fault.NONE]
    assert checked.answer == ["b", "", "", "d"]


def test_content_key_follows_the_content_alone(tmp_path: Path) -> None:
    first, second = write_lines(tmp_path / "a.jsonl", ROWS), write_lines(tmp_path / "b.jsonl", ROWS)
    assert content_key(Source(path=str(first))) == content_key(Source(path=str(second)))
    write_lines(second, ROWS[1:])
    assert content_key(Source(path=str(first))) != content_key(Source(path=str(second)))
    assert content_key(Source(path="openai/gsm8k")) is None


def test_question_key_ignores_white_space_and_case() -> None:
    assert question_key(" How  many\nApples?") == question_key("how many apples?")
    assert question_key("How many?") != question_key("How many!")
    assert np.int64(question_key("x")) == question_key("x")
