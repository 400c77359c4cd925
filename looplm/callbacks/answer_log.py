"""The file of generated answers: one JSON object a line, written as answers come, read again after a kill.

Knows files; nothing of models, tokens or grading.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from looplm.callbacks.output import replace_file

__all__ = ["AnswerLog"]

_KEY = ("source", "index", "depth", "sample")


class AnswerLog:
    """Answers under the settings that they were made with.

    The first line holds the settings, each other line one answer with ``source``, ``index``, ``depth`` and ``sample``,
    and ``num_answers``: how many its problem has. A problem that has fewer was cut off by a kill, and is not read.
    Processes write a file each, ``NAME.jsonl`` and ``NAME.rank1.jsonl``, …, which :meth:`merge` joins.

    Args:
        path: The file, ending in ``.jsonl``.
        settings: What decides the answers, as plain data. Answers under other settings are not taken over.
        rank: This process.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "answers.jsonl"
        >>> log = AnswerLog(path, {"step": 1})
        >>> log.append([{"source": "a", "index": 0, "depth": 4, "sample": 0, "text": "#### 5"}])
        >>> log.close()
        >>> [row["text"] for row in AnswerLog(path, {"step": 1}).rows]
        ['#### 5']
        >>> AnswerLog(path, {"step": 2}).rows
        []
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.own = path if rank == 0 else path.with_suffix(f".rank{rank}.jsonl")
        self.rows = _distinct(row for file in self._files() for row in self._read(file))
        # What was cut off in the middle of a problem, or is another run's, is not gone on with.
        self._rewrite(self.own, self._read(self.own))
        self._file = self.own.open("a", encoding="utf-8")

    def _files(self) -> list[Path]:
        return [self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.rank*.jsonl"))]

    def _read(self, file: Path) -> list[dict[str, Any]]:
        """Return the answers to a file's whole problems, none if it has other settings."""
        # Not `splitlines`, which also splits at line separators inside a text.
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
        rows = [row for row in map(_parsed, lines) if row is not None]
        if not rows or rows[0] != {"settings": self.settings}:
            return []
        answers = _distinct(row for row in rows[1:] if row.keys() >= set(_KEY))
        number = Counter(map(_problem, answers))
        return [row for row in answers if row.get("num_answers") == number[_problem(row)]]

    def _rewrite(self, file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for row in ({"settings": self.settings}, *rows)]
        replace_file(file, "".join(f"{line}\n" for line in lines).encode())

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write all answers to some problems; when this returns they are on the disk."""
        written = [dict(row) for row in rows]
        number = Counter(map(_problem, written))
        written = [{**row, "num_answers": number[_problem(row)]} for row in written]
        self._file.write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in written))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.extend(written)

    def merge(self) -> None:
        """Join the files of all processes in the order of their keys; for one process, when all have finished."""
        self._file.close()
        self.rows = _distinct(row for file in self._files() for row in self._read(file))
        self._rewrite(self.path, self.rows)
        for file in self._files()[1:]:
            file.unlink()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _problem(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["source"], row["index"]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _distinct(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what a distributed sampler repeated; in the order of the keys."""
    found = {tuple(row[name] for name in _KEY): row for row in rows}
    return [found[key] for key in sorted(found)]
