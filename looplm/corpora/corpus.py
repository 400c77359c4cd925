"""The rows of one source that are used, and a line that says what became of the others. Knows no order, no batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from looplm.corpora.batches import Example
from looplm.corpora.rows import PARTS, Fault
from looplm.corpora.sources import Source
from looplm.corpora.token_table import TokenTable
from looplm.errors import InputError

__all__ = ["BadRows", "Corpus", "Overlong", "RowPolicy", "describe_fault", "describe_length", "report"]

Overlong = Literal["drop", "truncate", "error"]
BadRows = Literal["error", "skip"]

_FAULTS = {
    Fault.EMPTY: "empty",
    Fault.NO_TEXT: "no string",
    Fault.NUL: "with a NUL character",
    Fault.MALFORMED: "broken",
}


@dataclass(frozen=True, kw_only=True)
class RowPolicy:
    """What happens to rows that cannot be used as they are.

    Raises:
        ValueError: If a value is not allowed.

    Example:
        >>> policy = RowPolicy(max_tokens=512, overlong="truncate", bad_rows="skip")
    """

    max_tokens: int
    """Most tokens of a row: prompt, solution and end mark."""
    overlong: Overlong = "drop"
    """Longer rows: left out, cut after ``max_tokens``, or an error."""
    bad_rows: BadRows = "error"
    """Rows that are no text (a number, a NUL character, a line that is no JSON object, or has more fields than its CSV
    file a header): an error, or left out. Rows where a text is empty are left out in any case."""

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"`max_tokens` must be >= 2, got {self.max_tokens}.")
        for name, allowed in (("overlong", ("drop", "truncate", "error")), ("bad_rows", ("error", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {getattr(self, name)!r}.")

    def verdict(self, fault: int, length: int, num_prompt: int) -> str:
        """Return what a row is: ``kept`` or why it is not; the same words count it in :func:`report`."""
        if fault:
            return _FAULTS[Fault(fault)]
        if length <= self.max_tokens:
            return "kept"
        if self.overlong != "truncate":
            return f"longer than {self.max_tokens} tokens"
        return "cut" if num_prompt < self.max_tokens else f"whose prompt alone has {self.max_tokens} tokens"


def describe_fault(source: Source, row: str, fault: int, part: int) -> str:
    """Return the error of a faulty row.

    Example:
        >>> describe_fault(Source(path="rows.jsonl"), "row 3", Fault.EMPTY, 0)
        "rows.jsonl, row 3, column 'question': empty; `bad_rows: skip` leaves such rows out."
    """
    column = source.columns.get(PARTS[part], PARTS[part])
    where = "" if fault == Fault.MALFORMED else f", column {column!r}"
    return f"{source.path}, {row}{where}: {_FAULTS[Fault(fault)]}; `bad_rows: skip` leaves such rows out."


def describe_length(source: Source, row: str, length: int, max_tokens: int) -> str:
    """Return the error of a row that is too long.

    Example:
        >>> describe_length(Source(path="rows.jsonl"), "row 3", 600, 512)  # doctest: +ELLIPSIS
        '...600...512...'
    """
    return (
        f"{source.path}, {row}: {length} tokens are more than `max_tokens` {max_tokens}; `overlong` may be drop or "
        "truncate."
    )


def _name(source: Source, row: int) -> str:
    return f"row {row + 1}" + (f" of {source.split}" if "[" in source.split else "")


def report(name: str, counts: Mapping[str, int], num_joined: int = 0, num_unknown: int = 0) -> str:
    """Return one line on what became of the rows.

    Args:
        name: The source.
        counts: Rows by verdict.
        num_joined: Used rows whose prompt and solution were encoded apart.
        num_unknown: Used rows that hold something that is not in the vocabulary.

    Example:
        >>> report("gsm8k", {"kept": 97, "cut": 1, "empty": 2})
        'gsm8k: 98 of 100 rows (1 of them cut); left out: 2 empty'
    """
    used = counts.get("kept", 0) + counts.get("cut", 0)
    line = f"{name}: {used} of {sum(counts.values())} rows"
    if counts.get("cut"):
        line += f" ({counts['cut']} of them cut)"
    left_out = [f"{number} {why}" for why, number in counts.items() if why not in ("kept", "cut") and number]
    line += f"; left out: {', '.join(left_out)}" if left_out else ""
    if num_joined:
        line += f"; in {num_joined} a token would have joined prompt and solution, which were encoded apart"
    return f"{line}; {num_unknown} hold something that the tokenizer has no id for" if num_unknown else line


class Corpus:
    """Rows of a source that are used.

    Args:
        source: The source.
        table: Its rows as tokens.
        policy: What happens to the others.

    Attributes:
        rows: Their places in the source, int64 ``(N,)``.
        lengths: Tokens of each, int64 ``(N,)``.
        counts: How many rows are used, and why how many are not.

    Raises:
        InputError: If a row is refused, or none is left.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from looplm.corpora.templates import SolutionText
        >>> from looplm.corpora.text_tokenizer import ByteTokenizer
        >>> from looplm.corpora.token_table import RowEncoder, token_table
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text(json.dumps({"question": "1+1?", "answer": "2"}))
        >>> source, text = Source(path=str(path)), SolutionText("{question} ", "{answer}", None)
        >>> table = token_table(source, RowEncoder(text, ByteTokenizer()), path.parent, skip_malformed=False)
        >>> Corpus(source, table, RowPolicy(max_tokens=64)).report()
        'rows: 1 of 1 rows'
    """

    def __init__(self, source: Source, table: TokenTable, policy: RowPolicy) -> None:
        self.source, self.table, self.policy = source, table, policy
        if policy.bad_rows == "error":
            refused = np.flatnonzero((table.fault != Fault.NONE) & (table.fault != Fault.EMPTY))
            if len(refused):
                row = int(refused[0])
                raise InputError(
                    describe_fault(source, _name(source, row), int(table.fault[row]), int(table.part[row]))
                )
        good = table.fault == Fault.NONE
        too_long = good & (table.lengths > policy.max_tokens)
        if policy.overlong == "error" and too_long.any():
            row = int(np.flatnonzero(too_long)[0])
            raise InputError(describe_length(source, _name(source, row), int(table.lengths[row]), policy.max_tokens))
        self.counts = {"kept": int((good & ~too_long).sum())}
        usable = good & ~too_long
        if policy.overlong == "truncate":
            cut = too_long & (table.num_prompt < policy.max_tokens)
            usable |= cut
            self.counts["cut"] = int(cut.sum())
        for fault, why in _FAULTS.items():
            self.counts[why] = int((table.fault == fault).sum())
        for left_out in np.flatnonzero(too_long & ~usable).tolist():
            why = policy.verdict(0, int(table.lengths[left_out]), int(table.num_prompt[left_out]))
            self.counts[why] = self.counts.get(why, 0) + 1
        self._keep(np.flatnonzero(usable))

    def _keep(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.lengths = np.minimum(self.table.lengths[rows], self.policy.max_tokens)
        if not len(rows):
            raise InputError(f"no row can be used: {self.report()}.")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keys(self) -> np.ndarray:
        """The key of each question, int64 ``(N,)``."""
        keys: np.ndarray = self.table.key[self.rows]
        return keys

    def leave_out(self, keys: np.ndarray, why: str) -> None:
        """Use no row whose question has one of the keys.

        Raises:
            InputError: If none is left.
        """
        mine = np.isin(self.keys, keys)
        if mine.any():
            self.counts[why] = self.counts.get(why, 0) + int(mine.sum())
            self.counts["kept"] -= int(mine.sum())
            self._keep(self.rows[~mine])

    def held_out(self, keys: np.ndarray) -> Corpus | None:
        """Return a corpus of the questions that have one of the keys, each once; None where there are none."""
        chosen = np.flatnonzero(np.isin(self.keys, keys))
        if not len(chosen):
            return None
        _, first = np.unique(self.keys[chosen], return_index=True)
        part = copy.copy(self)
        part.counts = {"kept": len(first)}
        part._keep(self.rows[np.sort(chosen[first])])
        return part

    def example(self, item: int) -> Example:
        """Return row ``rows[item]``."""
        row = int(self.rows[item])
        return Example(self.table.ids(row)[: self.policy.max_tokens], int(self.table.num_prompt[row]))

    def report(self) -> str:
        """Return one line on what became of the source's rows."""
        joined, unknown = (int(part[self.rows].sum()) for part in (self.table.joined, self.table.unknown))
        return report(self.source.label, self.counts, num_joined=joined, num_unknown=unknown)
