"""Rows as tokens: encoded once, kept in a file by content and settings, read from there without being loaded.

A row is prompt, solution and end mark. Where the solution begins is read off the offsets of one tokenisation of the
whole: tokenising the prompt apart and counting is wrong wherever a token would join the two, or where what follows
changes how the prompt's end is cut. Knows no order and no batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from looplm.corpora.rows import Fault, Rows, check_rows, question_key
from looplm.corpora.sources import READING, Source, content_key, load_rows, read_batches
from looplm.corpora.templates import PromptWriter, SolutionText
from looplm.corpora.text_tokenizer import TextTokenizer, first_token_after

__all__ = ["RowEncoder", "TokenTable", "plain_hash", "prompts_that_change", "token_table"]

_VERSION = 1  # of the file; another number makes old files unread
_COLUMNS = ("ids", "num_prompt", "fault", "part", "joined", "unknown", "key")


def plain_hash(*values: Any) -> str:
    """Return a hash of plain data.

    Example:
        >>> plain_hash(1, ["a"]) == plain_hash(1, ["a"])
        True
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """N encoded rows."""

    ids: list[np.ndarray]
    """Prompt, solution, end mark; nothing where the row is faulty."""
    num_prompt: np.ndarray
    """Tokens before the solution, int32 ``(N,)``."""
    joined: np.ndarray
    """Whether a token would have joined prompt and solution, so that the two were encoded apart, bool ``(N,)``."""
    unknown: np.ndarray
    """Whether something in it is not in the vocabulary, bool ``(N,)``."""


class RowEncoder:
    """Encodes checked rows.

    Args:
        text: The form of prompts and solutions.
        tokenizer: The tokenizer; one that learns has learnt.

    Example:
        >>> from looplm.corpora.text_tokenizer import ByteTokenizer
        >>> encoder = RowEncoder(SolutionText("{question} ", "{answer}", None), ByteTokenizer())
        >>> len(encoder.encode_prompts(["1+1?"])[0])
        5
    """

    def __init__(self, text: SolutionText, tokenizer: TextTokenizer) -> None:
        self.text, self.tokenizer = text, tokenizer
        self.prompts: PromptWriter = text.bind(tokenizer)

    def settings(self) -> str:
        """Return a hash of all that decides the ids."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self.tokenizer.files().items()}
        return plain_hash(_VERSION, self.text.settings(), type(self.tokenizer).__name__, files, self.prompts.end_id)

    def __call__(self, rows: Rows) -> EncodedRows:
        """Encode N rows."""
        good = np.flatnonzero(rows.fault == Fault.NONE).tolist()
        prompts = self.prompts([rows.question[row] for row in good])
        solutions = self.text.solutions([rows.answer[row] for row in good], [rows.final[row] for row in good])
        number = len(rows.fault)
        ids: list[np.ndarray] = [np.zeros(0, dtype=np.int32)] * number
        num_prompt, joined = np.zeros(number, dtype=np.int32), np.zeros(number, dtype=bool)
        encoded = self.tokenizer.encode([p + s for p, s in zip(prompts, solutions, strict=True)])
        for row, prompt, solution, whole in zip(good, prompts, solutions, encoded, strict=True):
            border, own = first_token_after(whole, len(prompt)), whole.ids
            span = whole.token_to_chars(border) if border < len(own) else None
            if span is not None and span[0] < len(prompt):
                # Generation begins after the prompt's last token, so the solution's first one must not reach into it.
                before, after = self.tokenizer.encode([prompt, solution])
                own, border, joined[row] = np.concatenate([before.ids, after.ids]), len(before.ids), True
            ids[row] = np.empty(len(own) + 1, dtype=np.int32)
            ids[row][:-1], ids[row][-1] = own, self.prompts.end_id
            num_prompt[row] = border
        return EncodedRows(ids=ids, num_prompt=num_prompt, joined=joined, unknown=self._has_unknown(ids))

    def _has_unknown(self, ids: list[np.ndarray]) -> np.ndarray:
        unknown = np.zeros(len(ids), dtype=bool)
        if self.tokenizer.unknown_id is not None and ids:
            ends = np.cumsum([len(row) for row in ids])
            places = np.flatnonzero(np.concatenate(ids) == self.tokenizer.unknown_id)
            unknown[np.searchsorted(ends, places, side="right")] = True
        return unknown

    def encode_prompts(self, questions: Sequence[str]) -> list[np.ndarray]:
        """Return what generation reads, one int32 array a question."""
        return [np.array(e.ids, dtype=np.int32) for e in self.tokenizer.encode(self.prompts(questions))]


def prompts_that_change(encoder: RowEncoder, rows: Rows) -> int:
    """Return in how many rows the prompt has other tokens in front of its solution than alone."""
    encoded = encoder(rows)
    good = np.flatnonzero(rows.fault == Fault.NONE)
    alone = encoder.encode_prompts([rows.question[row] for row in good])
    return sum(
        not np.array_equal(encoded.ids[row][: encoded.num_prompt[row]], prompt)
        for row, prompt in zip(good, alone, strict=True)
    )


class TokenTable:
    """Encoded rows in a memory-mapped file.

    Attributes:
        lengths: Tokens of each row, int64 ``(N,)``; 0 where it is faulty.
        num_prompt: Tokens before the solution, int32 ``(N,)``.
        fault: A :class:`~looplm.corpora.rows.Fault` each, int8 ``(N,)``.
        part: Which of question, answer, final has the fault, int8 ``(N,)``.
        joined: Whether prompt and solution were encoded apart, bool ``(N,)``.
        unknown: Whether something in it is not in the vocabulary, bool ``(N,)``.
        key: :func:`~looplm.corpora.rows.question_key` of each question, int64 ``(N,)``.
    """

    def __init__(self, data: Any) -> None:
        self._data = data  # keeps the file mapped
        chunks = data.column("ids").chunks
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._bounds = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._first_rows = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self.lengths = np.concatenate([np.diff(bounds) for bounds in self._bounds]).astype(np.int64)
        columns = {name: data.column(name).to_numpy() for name in _COLUMNS[1:]}
        self.num_prompt, self.fault, self.part = columns["num_prompt"], columns["fault"], columns["part"]
        self.joined, self.unknown, self.key = columns["joined"], columns["unknown"], columns["key"]

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, row: int) -> np.ndarray:
        """Return the tokens of a row, int32."""
        chunk = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        place = row - int(self._first_rows[chunk])
        bounds = self._bounds[chunk]
        ids: np.ndarray = self._values[chunk][bounds[place] : bounds[place + 1]]
        return ids


def token_table(source: Source, encoder: RowEncoder, cache_dir: Path, *, skip_malformed: bool) -> TokenTable:
    """Return a source's table: from its file where there is one, else encoded and written there, whole or not at all.

    Args:
        source: The source.
        encoder: Encodes its rows.
        cache_dir: Where the files are.
        skip_malformed: See :func:`~looplm.corpora.sources.load_rows`.

    Raises:
        InputError: If the source cannot be read.

    Example:
        >>> import json, tempfile
        >>> from looplm.corpora.text_tokenizer import ByteTokenizer
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text(json.dumps({"question": "1+1?", "answer": "2"}))
        >>> encoder = RowEncoder(SolutionText("{question} ", "{answer}", None), ByteTokenizer())
        >>> table = token_table(Source(path=str(path)), encoder, path.parent, skip_malformed=False)
        >>> len(table.ids(0))  # five of the prompt, one of the solution, its end
        7
    """
    import pyarrow as pa

    content, rows = content_key(source), None
    if content is None:
        rows = load_rows(source, cache_dir / "sources", skip_malformed=skip_malformed)
        content = rows._fingerprint  # of the hub's revision
    key = plain_hash(READING, content, source.split, source.columns, encoder.settings())
    path = cache_dir / "tokens" / f"{key}.arrow"
    if not path.is_file():
        if rows is None:
            rows = load_rows(source, cache_dir / "sources", skip_malformed=skip_malformed)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(rows, source, encoder, path)
    return TokenTable(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())


def _write(rows: Any, source: Source, encoder: RowEncoder, path: Path) -> None:
    import pyarrow as pa

    # Our own file, not map's: one that several processes may write at once, under a name that needs no hash of a
    # function; the last to finish replaces it by an equal one.
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")
    os.close(handle)
    try:
        writer = None
        for batch in read_batches(source, rows, 1000):
            encoded = _as_arrow(encoder, check_rows(source, batch))
            if writer is None:
                writer = pa.ipc.new_stream(draft, encoded.schema)
            writer.write_table(encoded)
        assert writer is not None, "a source has rows"
        writer.close()
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def _as_arrow(encoder: RowEncoder, rows: Rows) -> Any:
    import pyarrow as pa

    encoded = encoder(rows)
    lengths = [len(ids) for ids in encoded.ids]
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    flat = np.concatenate(encoded.ids) if lengths else np.zeros(0, dtype=np.int32)
    keys = np.array([question_key(question) for question in rows.question], dtype=np.int64)
    columns: Mapping[str, Any] = {
        "ids": pa.ListArray.from_arrays(pa.array(bounds), pa.array(flat.astype(np.int32))),
        "num_prompt": pa.array(encoded.num_prompt),
        "fault": pa.array(rows.fault),
        "part": pa.array(rows.part),
        "joined": pa.array(encoded.joined),
        "unknown": pa.array(encoded.unknown),
        "key": pa.array(keys),
    }
    return pa.table({name: columns[name] for name in _COLUMNS})
