"""A tokenizer learns from the training sources once; what it has learnt is kept by their content. Knows no trainer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from looplm.corpora.rows import Fault, check_rows
from looplm.corpora.sources import Source, content_key, read_batches
from looplm.corpora.templates import SolutionText
from looplm.corpora.text_tokenizer import TextTokenizer
from looplm.corpora.token_table import plain_hash

__all__ = ["learn_once"]

_MOST_ROWS = 200_000  # of each source, which is as much as a tokenizer needs


def learn_once(
    tokenizer: TextTokenizer,
    text: SolutionText,
    sources: Sequence[Source],
    rows: Sequence[Any],
    cache_dir: Path,
    *,
    streaming: bool,
) -> None:
    """Let a tokenizer learn, or restore what one with the same settings has learnt from the same corpus.

    Args:
        tokenizer: The tokenizer.
        text: The form of prompts and solutions.
        sources: The sources.
        rows: The rows of each, as :func:`~looplm.corpora.sources.load_rows` gives them.
        cache_dir: Where it is kept.
        streaming: Whether sources are too large to be read for their hash.

    Raises:
        InputError: If a source cannot be read.
    """
    keys = []
    for source, found in zip(sources, rows, strict=True):
        content = content_key(source, thorough=not streaming) or getattr(found, "_fingerprint", None) or source.revision
        keys.append([content, source.path, source.split, source.columns])
    key = plain_hash(type(tokenizer).__name__, tokenizer.settings(), text.settings(), keys, _MOST_ROWS)
    path = cache_dir / "tokenizers" / f"{key}.json"
    if not path.is_file():
        pairs = zip(sources, rows, strict=True)
        tokenizer.learn(line for source, found in pairs for line in _texts(source, found, text))
        _write_once(path, tokenizer.files()["tokenizer.json"])
    # Read back even by who wrote it: of several processes that learnt, all use what the first one wrote.
    tokenizer.restore({"tokenizer.json": path.read_bytes()})


def _texts(source: Source, rows: Any, text: SolutionText) -> Iterator[str]:
    """Yield prompt and solution of the first rows, what a tokenizer learns from."""
    for batch in islice(read_batches(source, rows, 1000), _MOST_ROWS // 1000):
        checked = check_rows(source, batch)
        good = np.flatnonzero(checked.fault == Fault.NONE)
        yield from text.plain_prompts([checked.question[row] for row in good])
        yield from text.solutions([checked.answer[row] for row in good], [checked.final[row] for row in good])


def _write_once(path: Path, content: bytes) -> None:
    """Write a file whole, unless another process has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        if not path.is_file():
            os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
