"""Corpora that are made instead of read: a source's ``path`` such as ``word_problems?num_rows=50000&max_steps=2``.

Knows our generators and where their rows are kept.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from looplm.corpora.operation_graphs import OperationGraph
from looplm.corpora.word_problem_draft import DISTRACTORS, draw_draft
from looplm.corpora.word_problem_scenes import Scene
from looplm.corpora.word_problems import WordProblem, word_problems
from looplm.errors import InputError

__all__ = ["generated_file", "is_generated"]

_NAME = "word_problems"
_DEFAULTS: dict[str, Any] = {
    "split": "train",
    "num_rows": 20_000,
    "seed": 0,
    "min_steps": 1,
    "max_steps": 6,
    "distractors": DISTRACTORS,
}


def is_generated(path: str) -> bool:
    """Return whether a path names a generator.

    Example:
        >>> is_generated("word_problems?num_rows=100"), is_generated("word_problems.jsonl")
        (True, False)
    """
    return path == _NAME or path.startswith(f"{_NAME}?")


def generated_file(path: str) -> Path:
    """Return the file with a generator's rows, which is made if it is not there yet.

    Args:
        path: ``word_problems?…`` with any of ``split`` (``train``, ``val``, ``test``: disjoint by construction),
            ``num_rows``, ``seed``, ``min_steps``, ``max_steps``, ``distractors`` (a chance; see
            :func:`~looplm.corpora.word_problems.word_problems`).

    Raises:
        InputError: If an option is unknown or out of its range.

    Example:
        >>> generated_file("word_problems?num_rows=4&max_steps=1").name  # doctest: +SKIP
    """
    options = {**_DEFAULTS, **_options(path)}
    # Other code makes other problems.
    parts = (OperationGraph, Scene, draw_draft, WordProblem)
    code = [inspect.getsource(inspect.getmodule(part)) for part in parts]  # type: ignore[arg-type]
    key = hashlib.sha256(json.dumps([options, code], sort_keys=True).encode()).hexdigest()[:32]
    import datasets

    target = Path(datasets.config.HF_DATASETS_CACHE) / "looplm" / "generated" / f"{key}.jsonl"
    if not target.is_file():
        _write(target, options, path)
    return target


def _options(path: str) -> dict[str, Any]:
    pairs = parse_qsl(path.partition("?")[2], keep_blank_values=True)
    unknown = sorted({name for name, _ in pairs} - _DEFAULTS.keys())
    if unknown:
        raise InputError(f"{path}: the options are {sorted(_DEFAULTS)}, got {unknown[0]!r}.")
    try:
        return {name: type(_DEFAULTS[name])(value) for name, value in pairs}
    except ValueError:
        raise InputError(f"{path}: `distractors` is a number, all other options but `split` are integers.") from None


def _write(target: Path, options: dict[str, Any], path: str) -> None:
    try:
        problems = word_problems(
            options["seed"],
            options["split"],
            options["num_rows"],
            min_steps=options["min_steps"],
            max_steps=options["max_steps"],
            distractors=options["distractors"],
        )
        lines = "".join(json.dumps(problem.row()) + "\n" for problem in problems)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(lines)
    os.replace(draft, target)  # of several processes each writes the same
