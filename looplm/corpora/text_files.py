"""Rows of JSON and CSV files, read one by one, so that each is judged by itself, whatever stands in the others.

A reader of whole columns guesses a type for many rows at once and changes the values that do not fit: "2020-01-01" to a
date, every text to its JSON where one row has a number. Knows files and columns, no source.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from looplm.errors import InputError

__all__ = ["MALFORMED", "NOT_TEXT", "TEXT_FORMATS", "text_rows"]

MALFORMED = "__malformed__"
"""A column that marks what is no row, where such are skipped."""
NOT_TEXT = "__not_text__"
"""A column with the name of a row's first column that holds something other than a text."""
TEXT_FORMATS = ("json", "jsonl", "csv", "tsv")
"""Endings of the files that are read here; ``.gz`` may follow."""

_ENOUGH = 10_000  # rows without a column, before it is called missing
_MARK = b"\xef\xbb\xbf"  # with which some programs begin UTF-8


def text_rows(
    files: Sequence[str], needed: Sequence[str], numbers: Collection[str], *, skip_malformed: bool
) -> Iterator[dict[str, Any]]:
    r"""Yield one row a JSON object or line of CSV: the needed columns, and the marks.

    Args:
        files: The files.
        needed: The columns: a text each, None where there is none.
        numbers: The columns of them where a number is its digits.
        skip_malformed: Whether what is no row is marked instead of refused.

    Raises:
        InputError: If a file cannot be read, or lacks a column.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"question": "1+1?", "answer": 2}\n')
        >>> next(text_rows([str(path)], ["question", "answer"], ["answer"], skip_malformed=False))
        {'question': '1+1?', 'answer': '2', '__not_text__': None, '__malformed__': False}
    """
    for path in map(Path, files):
        seen: set[str] = set()
        number = 0
        for number, (where, found) in enumerate(_readable(path), start=1):
            row = found
            if isinstance(found, dict):
                seen |= found.keys()
                row = _texts(found, needed, numbers)
            if isinstance(row, str) and not skip_malformed:
                raise InputError(f"{path}, {where}: {row}.")
            yield row if isinstance(row, dict) else {**dict.fromkeys(needed), NOT_TEXT: None, MALFORMED: True}
            if number == _ENOUGH:
                _check_columns(path, seen, needed)
        if number == 0:
            raise InputError(f"{path}: the file has no rows.")
        _check_columns(path, seen, needed)


def _check_columns(path: Path, seen: set[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in seen]
    if missing and seen:
        raise InputError(f"{path}: column {missing[0]!r} is missing; the columns are {sorted(seen)}.")


def _texts(found: dict[str, Any], needed: Sequence[str], numbers: Collection[str]) -> dict[str, Any] | str:
    """Return the row of an object, or why it is none."""
    row: dict[str, Any] = {name: found.get(name) for name in needed}
    not_text = None
    for name, value in row.items():
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                return f"column {name!r} holds half of a surrogate pair, which is no character"
        elif isinstance(value, int | float) and not isinstance(value, bool) and name in numbers:
            row[name] = str(value)
        elif value is not None:
            row[name], not_text = None, not_text or name
    return {**row, NOT_TEXT: not_text, MALFORMED: False}


# What a file holds: the place of each row, and an object by columns or why it is none.
_Found = Iterator[tuple[str, dict[str, Any] | str]]


def _readable(path: Path) -> _Found:
    kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        yield from _json(path) if kind.startswith("json") else _csv(path, "\t" if kind == "tsv" else ",")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read: no UTF-8: {error}.") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}.") from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _json(path: Path) -> _Found:
    with _open(path) as file:
        is_array = file.read(64).removeprefix(_MARK).lstrip().startswith(b"[")
        file.seek(0)
        if is_array:
            rows, fault = _parsed(file.read())
            if fault is not None:
                raise InputError(f"{path}: {fault}.")
            for number, row in enumerate(rows, start=1):
                yield f"item {number}", _as_object(row)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                row, fault = _parsed(line.strip())
                yield f"line {number}", fault or _as_object(row)


def _parsed(data: bytes) -> tuple[Any, str | None]:
    """Return what JSON says, and why it is none."""
    try:
        return json.loads(data), None
    except UnicodeDecodeError as error:
        return None, f"no UTF-8: {error}"
    except RecursionError:
        return None, "JSON that is nested too deeply"
    except ValueError as error:
        return None, f"no JSON: {error}"


def _as_object(row: Any) -> dict[str, Any] | str:
    return row if isinstance(row, dict) else f"a row must be an object, got {type(row).__name__}"


def _csv(path: Path, separator: str) -> _Found:
    csv.field_size_limit(2**31 - 1)  # as it is, an answer may be longer
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        header = next(reader, [])
        places = {name: header.index(name) for name in header}  # of two columns with one name the first
        while True:
            where = f"line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, f"no CSV: {error}"
                continue
            if any(fields[len(header) :]):
                yield where, f"{len(fields)} fields, but the header has {len(header)}"
            elif fields:
                fields += [""] * (len(header) - len(fields))
                yield where, {name: fields[place] for name, place in places.items()}
