"""Corpora that are made instead of read: a source's ``path`` such as ``word_problems?num_rows=50000&max_steps=2``.

Knows our generators and where their rows are kept.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from looplm.corpora.calculations import calculations
from looplm.corpora.operation_graphs import OperationGraph
from looplm.corpora.word_problem_draft import draw_draft
from looplm.corpora.word_problem_scenes import Scene
from looplm.corpora.word_problems import WordProblem, word_problems
from looplm.errors import InputError

__all__ = ["generated_file", "is_generated"]

_OPTIONS: dict[str, dict[str, Any]] = {
    "word_problems": {"split": "train", "num_rows": 20_000, "seed": 0, "min_steps": 1, "max_steps": 6},
    "calculations": {"split": "train", "num_rows": 4_000, "seed": 0},
}
_GENERATORS: dict[str, Callable[..., Iterator[WordProblem]]] = {
    "word_problems": word_problems,
    "calculations": calculations,
}


def is_generated(path: str) -> bool:
    """Return whether a path names a generator.

    Example:
        >>> is_generated("word_problems?num_rows=100"), is_generated("word_problems.jsonl")
        (True, False)
    """
    return path.partition("?")[0] in _OPTIONS


def generated_file(path: str) -> Path:
    """Return the file with a generator's rows, which is made if it is not there yet.

    Args:
        path: ``word_problems?…`` with any of ``split`` (``train``, ``val``, ``test``: disjoint by construction),
            ``num_rows``, ``seed``, ``min_steps``, ``max_steps``; or ``calculations?…`` with the first three.

    Raises:
        InputError: If an option is unknown or out of its range.

    Example:
        >>> generated_file("word_problems?num_rows=4&max_steps=1").name  # doctest: +SKIP
    """
    name = path.partition("?")[0]
    options = {**_OPTIONS[name], **_options(path)}
    # Other code makes other problems.
    parts = (OperationGraph, WordProblem, draw_draft, Scene, _GENERATORS[name])
    code = [inspect.getsource(inspect.getmodule(part)) for part in parts]  # type: ignore[arg-type]
    key = hashlib.sha256(json.dumps([name, options, code], sort_keys=True).encode()).hexdigest()[:32]
    import datasets

    target = Path(datasets.config.HF_DATASETS_CACHE) / "looplm" / "generated" / f"{key}.jsonl"
    if not target.is_file():
        _write(target, options, path)
    return target


def _options(path: str) -> dict[str, Any]:
    generator, _, query = path.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    unknown = sorted({name for name, _ in pairs} - _OPTIONS[generator].keys())
    if unknown:
        raise InputError(f"{path}: the options are {sorted(_OPTIONS[generator])}, got {unknown[0]!r}.")
    try:
        return {name: value if name == "split" else int(value) for name, value in pairs}
    except ValueError:
        raise InputError(f"{path}: all options but `split` are integers.") from None


def _write(target: Path, options: dict[str, Any], path: str) -> None:
    options = dict(options)
    try:
        seed, split, num_rows = (options.pop(name) for name in ("seed", "split", "num_rows"))
        problems = _GENERATORS[path.partition("?")[0]](seed, split, num_rows, **options)
        lines = "".join(json.dumps(problem.row()) + "\n" for problem in problems)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(lines)
    os.replace(draft, target)  # of several processes each writes the same
