"""From the columns of a source to checked texts: which rows can be used, and what is wrong with the others.

Knows columns and texts, no tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from looplm.corpora.sources import Source
from looplm.corpora.templates import filled, placeholders
from looplm.corpora.text_files import MALFORMED, NOT_TEXT

__all__ = ["Fault", "Rows", "check_rows", "question_key"]

PARTS = ("question", "answer", "final")


class Fault(IntEnum):
    """Why a row cannot be used.

    Example:
        >>> Fault(0).name  # a row that can be used
        'NONE'
    """

    NONE = 0
    EMPTY = 1
    """Nothing, or only white space, where a text must be."""
    NO_TEXT = 2
    """Something other than a string."""
    NUL = 3
    """A NUL character, which is no text."""
    MALFORMED = 4
    """What is no row of its file."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N rows of texts; those of a faulty row are empty.

    Example:
        >>> rows = check_rows(Source(path="rows.jsonl"), {"question": ["1+1?", " "], "answer": ["2", "3"]})
        >>> rows.question, rows.fault.tolist()
        (['1+1?', ''], [0, 1])
    """

    question: list[str]
    answer: list[str]
    """Where the source has none, the final answer."""
    final: list[str]
    """Where the source has none, empty."""
    fault: np.ndarray
    """A :class:`Fault` each, int8 ``(N,)``."""
    part: np.ndarray
    """Which of question, answer, final has the fault, int8 ``(N,)``."""


def check_rows(source: Source, batch: Mapping[str, list[Any]]) -> Rows:
    """Read the parts of a batch of rows and check them.

    Args:
        source: Says which columns they are in.
        batch: The columns, lists of N values; the marks of :mod:`~looplm.corpora.text_files` among them.

    Example:
        >>> check_rows(Source(path="rows.jsonl"), {"question": ["1+1?"], "answer": [2]}).fault.tolist()
        [2]
    """
    columns = source.columns
    number = len(next(iter(batch.values())))
    fault, part = np.zeros(number, dtype=np.int8), np.zeros(number, dtype=np.int8)
    texts: dict[str, list[str]] = {}
    for index, name in enumerate(PARTS):
        if name not in columns:
            texts[name] = [""] * number
            continue
        names = source.names(name)
        # Corpora write final answers as numbers, too.
        read = [[_text(value, name == "final") for value in batch[column]] for column in names]
        for row, column in enumerate(batch.get(NOT_TEXT, ())):
            if column in names:
                read[names.index(column)][row] = Fault.NO_TEXT
        found = read[0] if not placeholders(columns[name]) else _joined(columns[name], names, read)
        for row, value in enumerate(found):
            if isinstance(value, Fault):
                found[row] = ""
                if fault[row] == Fault.NONE:
                    fault[row], part[row] = value, index
        texts[name] = found
    for row, malformed in enumerate(batch.get(MALFORMED, ())):
        if malformed:
            fault[row], part[row] = Fault.MALFORMED, 0
    if "answer" not in columns:
        texts["answer"] = texts["final"]
    return Rows(question=texts["question"], answer=texts["answer"], final=texts["final"], fault=fault, part=part)


def _text(value: Any, may_be_number: bool) -> Any:
    """Return a text, or what is wrong with the value."""
    if value is None:
        return Fault.EMPTY
    if not isinstance(value, str):
        if not may_be_number or isinstance(value, bool) or not isinstance(value, int | float):
            return Fault.NO_TEXT
        return str(value)
    if not value or value.isspace():
        return Fault.EMPTY
    return Fault.NUL if "\0" in value else value


def _joined(pattern: str, names: list[str], read: list[list[Any]]) -> list[Any]:
    """Fill a pattern row by row; a fault in a column is one of the whole."""
    joined: list[Any] = []
    for values in zip(*read, strict=True):
        faults = [value for value in values if isinstance(value, Fault)]
        joined.append(faults[0] if faults else filled(pattern, dict(zip(names, values, strict=True))))
    return joined


def question_key(question: str) -> int:
    """Return 63 bits of a question; the same for questions that differ in white space and letter case alone.

    Example:
        >>> question_key("What is  1+1?") == question_key("what is 1+1?")
        True
    """
    text = " ".join(question.casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big") >> 1
