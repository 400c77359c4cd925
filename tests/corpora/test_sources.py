"""Every format gives the same rows, and what is wrong with a corpus is said in one line."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Iterator
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
    with pytest.raises(InputError, match=r"split 'train\[500:\]' has no rows"):
        load_rows(Source(path=str(tmp_path / "rows.jsonl"), split="train[500:]"), tmp_path / "cache")


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "broken JSON": ("a.jsonl", b'{"question":"a","answer":"b"}\n{"question":"a","ans\n', "line 2: no JSON: Unterm"),
    "broken array": (
        "a.json",
        b'[{"question":"a","answer":"b"},\n{"question"]',
        "no JSON: Expecting ':' delimiter: line 2",
    ),
    "numbers": ("a.jsonl", b'{"question":"a","answer":"b"}\n3\n', "line 2: a row must be an object, got int"),
    "no UTF-8": ("a.jsonl", '{"question":"é","answer":"b"}\n'.encode("latin-1"), "line 1: no UTF-8"),
    "half a pair": (
        "a.jsonl",
        b'{"question":"a","answer":"b"}\n{"question":"\\ud800","answer":"b"}\n',
        "line 2: column 'question' holds half of a surrogate pair",
    ),
    "too deep": ("a.jsonl", b'{"question":"a","answer":' + b"[" * 100_000, "line 1: JSON that is nested too deeply"),
    "raw NUL": ("a.jsonl", b'{"question":"a\0","answer":"b"}\n', "line 1: no JSON: Invalid control character"),
    "no bytes": ("a.jsonl", b"", "a.jsonl: the file has no rows"),
    "only white space": ("a.jsonl", b"\n \n", "a.jsonl: the file has no rows"),
    "another column": ("a.jsonl", b'{"question":"a","solution":"b"}\n', "column 'answer' is missing; the columns are"),
    "another column far on": ("a.jsonl", b'{"question":"a"}\n' * 10_000 + b"{", "column 'answer' is missing"),
    "no gzip": ("a.jsonl.gz", b'{"question":"a","answer":"b"}\n', "a.jsonl.gz"),
    "broken gzip": ("a.jsonl.gz", gzip.compress(b"{}")[:10] + b"\xff" * 99, "a.jsonl.gz cannot be read: Error"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"question":"a","answer":"b"}\n' * 99)[:-9], "gz cannot be read: Compr"),
    "long CSV line": ("a.csv", b"question,answer\na,b,c\n", "a.csv, line 2: 3 fields, but the header has 2"),
    "open quote": ("a.csv", b'question,answer\na,b\n"c,d\n', "a.csv, line 3: no CSV: unexpected end of data"),
    "CSV that is no UTF-8": ("a.csv", "question,answer\né,b\n".encode("latin-1"), "a.csv cannot be read: no UTF-8"),
    "no parquet": ("a.parquet", b"PAR1 not really", "a.parquet"),
    "unknown ending": ("a.xml", b"<a/>", "must end in one of"),
    "header alone": ("a.csv", b"question,answer\n", "a.csv: the file has no rows"),
}


@pytest.fixture
def datasets_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the library logs, which would stand above our one line."""
    logger = logging.getLogger("datasets")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("streaming", [False, True], ids=["kept", "streamed"])
def test_what_cannot_be_read_is_said_in_one_line(
    case: str, streaming: bool, tmp_path: Path, datasets_log: pytest.LogCaptureFixture
) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    source = Source(path=str(tmp_path / name))
    with pytest.raises(InputError) as caught:
        list(read_batches(source, load_rows(source, tmp_path / "cache", streaming=streaming), 10))
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert datasets_log.records == []


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


def _skipping(path: Path, **fields: Any) -> list[tuple[Any, ...]]:
    """Read a source that has broken rows: what its answers are and what is wrong with each."""
    source = Source(path=str(path), **fields)
    checked = check_rows(source, load_rows(source, path.parent / "cache", skip_malformed=True)[:])
    return list(zip(checked.answer, map(Fault, checked.fault.tolist()), strict=True))


SKIPPED: dict[str, tuple[str, bytes]] = {
    "lines": ("a.jsonl", b'{"question":"a","answer":"b"}\n{"ques\n[1]\n\n{"question":"c","answer":"d","x":[1]}\n'),
    "array": ("a.json", b'[{"question":"a","answer":"b"}, 1, "x", {"question":"c","answer":"d"}]'),
    "csv": ("a.csv", b'question,answer\na,b\na,b,c\n\n"a"b,c\nc,d,\n'),
    "hostile lines": (
        "a.jsonl",
        b'{"question":"a","answer":"b"}\n{"question":"\\udc00","answer":"b"}\n'
        + b"[" * 100_000
        + b'\n{"question":"c","answer":"d"}',
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_is_no_row_is_marked_where_it_is_to_be_skipped(case: str, tmp_path: Path) -> None:
    name, content = SKIPPED[case]
    (tmp_path / name).write_bytes(content)
    marked = [("", Fault.MALFORMED)] * 2
    assert _skipping(tmp_path / name) == [("b", Fault.NONE), *marked, ("d", Fault.NONE)]


@pytest.mark.parametrize("case", ["broken gzip", "cut gzip", "no UTF-8 at all"])
def test_file_that_breaks_off_is_an_error_even_where_lines_are_skipped(case: str, tmp_path: Path) -> None:
    name, content, _ = BROKEN.get(case, ("a.csv", b"question,answer\n\xff,b\n", ""))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        _skipping(tmp_path / name)


def test_split_is_the_same_part_with_a_broken_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS[:20])
    with path.open("a") as file:
        file.write('{"question": "half a li\n')
    answers = [(row["answer"], Fault.NONE) for row in ROWS[:20]]
    assert _skipping(path, split="train[:5]") == answers[:5]
    assert _skipping(path, split="train[10:]") == [*answers[10:], ("", Fault.MALFORMED)]
    assert _skipping(path, split="train[:10%]+train[18:20]") == answers[:2] + answers[18:]


def test_what_is_no_text_stays_so_beside_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    values = ["5", "2.5", '"x"', "true", '["x"]', "null"]
    lines = [f'{{"question": "q", "answer": {value}, "final": {value}}}' for value in values]
    path.write_text("\n".join([*lines, "broken"]))
    assert [fault for _, fault in _skipping(path)] == [
        Fault.NO_TEXT,
        Fault.NO_TEXT,
        Fault.NONE,
        Fault.NO_TEXT,
        Fault.NO_TEXT,
        Fault.EMPTY,
        Fault.MALFORMED,
    ]
    of_finals = _skipping(path, answer=None, final="final")
    assert of_finals[:4] == [("5", Fault.NONE), ("2.5", Fault.NONE), ("x", Fault.NONE), ("", Fault.NO_TEXT)]


@pytest.mark.parametrize("streaming", [False, True], ids=["kept", "streamed"])
def test_number_far_into_a_file_changes_no_other_row(streaming: bool, tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": f'It is "{i}"' + "." * 10**6} for i in range(14)]
    path = write_lines(tmp_path / "a.jsonl", [*rows[:12], {"question": "?", "answer": 5}, *rows[12:]])
    assert path.stat().st_size > 10 << 20  # more than is read at once where types are guessed
    source = Source(path=str(path))
    read = next(read_batches(source, load_rows(source, tmp_path / "cache", streaming=streaming), 100))
    checked = check_rows(source, read)
    assert checked.fault.tolist() == [0] * 12 + [Fault.NO_TEXT, 0, 0]
    assert [answer for answer in checked.answer if answer] == [row["answer"] for row in rows]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_text_that_looks_like_something_else_stays_a_text(name: str, tmp_path: Path) -> None:
    texts = ["2020-01-01", "007", "NA", "1.50", "null"]
    rows = [{"question": "q", "answer": text} for text in texts]
    if name == "a.csv":
        (tmp_path / name).write_text("question,answer\n" + "".join(f"q,{text}\n" for text in texts), "utf-8-sig")
    else:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) if "l" in name else json.dumps(rows), "utf-8-sig")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes((tmp_path / name).read_bytes())
    for path in (tmp_path / name, tmp_path / "folder"):
        assert _skipping(path) == [(text, Fault.NONE) for text in texts]


def test_fault_in_a_directory_is_found_in_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "a.jsonl", ROWS[:2])
    (folder / "b.jsonl").write_text(json.dumps(ROWS[2]) + "\nbroken\n")
    source = Source(path=str(folder))
    with pytest.raises(InputError, match=r"b\.jsonl, line 2: no JSON"):
        load_rows(source, tmp_path / "cache")
    assert [fault for _, fault in _skipping(folder)] == [Fault.NONE] * 3 + [Fault.MALFORMED]
    write_lines(folder / "b.jsonl", [{"question": "q", "solution": "s"}])
    with pytest.raises(InputError, match=r"b\.jsonl: column 'answer' is missing; the columns are"):
        load_rows(source, tmp_path / "cache")


def test_files_of_a_directory_with_other_columns_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    _table().to_parquet(folder / "a.parquet")
    _table().rename_column("answer", "solution").to_parquet(folder / "b.parquet")
    with pytest.raises(InputError, match=r"1 missing columns \({'answer'}\)"):
        load_rows(Source(path=str(folder)), tmp_path / "cache")


def test_mixed_types_in_a_file_of_the_hub_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets_log: pytest.LogCaptureFixture
) -> None:
    write_lines(tmp_path / "a.jsonl", [*ROWS[:3], {"question": "?", "answer": 5}])
    build = datasets.load_dataset_builder

    def from_disk(path: str, *_: Any, revision: str | None, **options: Any) -> Any:
        assert path == "owner/name"
        return build("json", data_files=[str(tmp_path / "a.jsonl")], cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", from_disk)
    with pytest.raises(InputError, match=r"owner/name .* Column\(/answer\) changed from string to number in row 3"):
        load_rows(Source(path="owner/name"), tmp_path / "cache")
    assert datasets_log.records == []


def test_part_of_a_split_is_refused_in_streaming(corpus_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in streaming `split` must be a whole one, got 'train\[:5\]'"):
        load_rows(Source(path=str(corpus_file), split="train[:5]"), tmp_path, streaming=True)


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
