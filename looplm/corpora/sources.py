"""Where rows come from: local files and directories, saved datasets, the Hugging Face hub; read by ``datasets``.

Knows files and columns, no tokens. What cannot be read ends in one line that names file, row and column.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from looplm.corpora.generated import generated_file, is_generated
from looplm.corpora.templates import placeholders
from looplm.corpora.text_files import MALFORMED, NOT_TEXT, TEXT_FORMATS, text_rows
from looplm.errors import InputError

__all__ = ["READING", "Source", "content_key", "load_rows", "read_batches"]

READING = 1
"""How files are read; another number makes unread what was kept of an earlier reading."""

_TABLE_FORMATS = ("parquet", "arrow")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus, or one split of it.

    A column is named by itself or, where a text is made of several, by a pattern such as ``{Body} {Question}``.

    Raises:
        ValueError: If a value is outside its range or has no effect.

    Example:
        >>> source = Source(path="openai/gsm8k", subset="main", split="test", weight=2.0)
        >>> source.label, source.is_file
        ('gsm8k', False)
    """

    path: str
    """A file (json, jsonl, csv, tsv, parquet, arrow; the texts also ``.gz``), a directory of them or one that
    ``save_to_disk`` wrote, a hub id ``owner/name``, or ``word_problems?num_rows=50000&max_steps=2``, which our
    generator makes (see :func:`~looplm.corpora.generated.generated_file`)."""
    name: str | None = None
    """Its name in logs and results; None: that of the file, directory or hub id."""
    split: str = "train"
    """The split, or a part of one such as ``train[:500]``; a single file is one split, ``train``."""
    subset: str | None = None
    """Configuration of a hub dataset, for example ``main``."""
    revision: str | None = None
    """Revision of a hub dataset; None: the newest."""
    question: str = "question"
    """Column of the question."""
    answer: str | None = "answer"
    """Column of the full solution; None: there is none, and the final answer takes its place."""
    final: str | None = None
    """Column of the final answer; None: there is none (grading extracts it from the solution)."""
    weight: float = 1.0
    """Share of the training stream, relative to the other sources'."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("`path` of a source must name a file, a directory or a hub id, got ''.")
        if not self.weight > 0 or self.weight == float("inf"):
            raise ValueError(f"`weight` must be > 0, got {self.weight} for {self.path!r}.")
        if self.answer is None and self.final is None:
            raise ValueError(f"a source needs a column `answer` or `final`, got neither for {self.path!r}.")
        if self.is_file and not self.split.startswith("train"):
            raise ValueError(f"`split` of a single file must be `train` or a part of it, got {self.split!r}.")
        if self.root.exists():
            for field in ("revision", "subset"):
                if getattr(self, field) is not None:
                    raise ValueError(f"`{field}` has no effect on a local path, got {getattr(self, field)!r}.")

    @property
    def root(self) -> Path:
        """Where it is on this machine, if it is there; what is generated is made now, unless it was before."""
        return generated_file(self.path) if is_generated(self.path) else Path(self.path)

    @property
    def is_file(self) -> bool:
        """Whether it is a single local file."""
        return self.root.is_file()

    @property
    def label(self) -> str:
        """Its name."""
        if self.name is not None:
            return self.name
        name = self.path.partition("?")[0] if is_generated(self.path) else self.root.name
        return name.split(".")[0] if self.is_file else name

    @property
    def columns(self) -> dict[str, str]:
        """The pattern of each part of a row that the source has: question, answer, final."""
        named = {"question": self.question, "answer": self.answer, "final": self.final}
        # A plain name is a pattern of one place; names with spaces are only possible so.
        return {part: column for part, column in named.items() if column is not None}

    @property
    def needed(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys(name for part in self.columns for name in self.names(part)))

    def names(self, part: str) -> list[str]:
        """Return the columns of one part of a row."""
        return placeholders(self.columns[part]) or [self.columns[part]]

    @property
    def numbers(self) -> list[str]:
        """The columns that may be numbers: those of the final answer alone, which corpora write so, too."""
        texts = [name for part in self.columns if part != "final" for name in self.names(part)]
        return [name for name in self.needed if name not in texts]


def content_key(source: Source, thorough: bool = True) -> str | None:
    """Return a hash of a local source's content; None for the hub, where the revision tells.

    Args:
        source: The source.
        thorough: Read the files; else their names, sizes and times stand for them.

    Example:
        >>> content_key(Source(path="openai/gsm8k")) is None  # the hub's revision tells
        True
    """
    root = source.root
    if not root.exists():
        return None
    digest = hashlib.sha256()
    for path in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
        state = path.stat()
        if root.is_dir():
            digest.update(str(path.relative_to(root)).encode() + b"\0")
        if thorough:
            digest.update(_file_hash(path.resolve(), state.st_size, state.st_mtime_ns))
        else:
            digest.update(f"{path.resolve()}/{state.st_size}/{state.st_mtime_ns}".encode())
    return digest.hexdigest()


@lru_cache(maxsize=10_000)
def _file_hash(path: Path, size: int, time: int) -> bytes:
    """Return a file's hash; within a process a file of the same size and time is not read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def load_rows(source: Source, cache_dir: Path, *, skip_malformed: bool = False, streaming: bool = False) -> Any:
    """Return the rows of a source, with the needed columns at least.

    Args:
        source: The source.
        cache_dir: Where ``datasets`` keeps what it has read.
        skip_malformed: Whether what is no row of a JSON or CSV file is marked in a column instead of refused.
        streaming: Whether rows are read as they are asked for.

    Returns:
        A ``Dataset``, or an ``IterableDataset`` in streaming.

    Raises:
        InputError: If it cannot be read, is empty, or lacks a column.

    Example:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text(json.dumps({"question": "1+1?", "answer": "2"}))
        >>> rows = load_rows(Source(path=str(path)), path.parent)
        >>> list(read_batches(Source(path=str(path)), rows, 8))[0]["answer"]
        ['2']
    """
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it would log of a broken file is said in our error
    if streaming and "[" in source.split:
        raise InputError(f"{source.path}: in streaming `split` must be a whole one, got {source.split!r}.")
    try:
        rows = _load(source, cache_dir, skip_malformed, streaming)
        # A stream may not know its columns, or that it has no rows, before it is read.
        names = list(next(iter(rows), {})) if streaming else rows.column_names
    except Exception as error:
        raise InputError(_diagnosis(source, error)) from None
    missing = [name for name in source.needed if name not in names]
    if missing and names:
        raise InputError(f"{source.path}: column {missing[0]!r} is missing; the columns are {sorted(names)}.")
    if not names or (not streaming and len(rows) == 0):
        raise InputError(f"{source.path}: split {source.split!r} has no rows.")
    return rows


def _load(source: Source, cache_dir: Path, skip_malformed: bool, streaming: bool) -> Any:
    from datasets import load_dataset, load_dataset_builder, load_from_disk

    root = source.root
    options: dict[str, Any] = {"split": source.split, "streaming": streaming}
    if root.exists():
        folder = str(cache_dir / f"{(content_key(source, thorough=not streaming) or '')[:32]}-{READING}")
        if source.is_file:
            if _format(root) in TEXT_FORMATS:
                return _text_rows(source, {"train": [str(root)]}, folder, skip_malformed, streaming)
            return load_dataset(_format(root), data_files=[str(root)], cache_dir=folder, **options)
        if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
            return _saved(source, load_from_disk(str(root)), streaming)
        builder = load_dataset_builder(str(root), cache_dir=folder)
        if builder.name in ("json", "csv"):
            files = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
            return _text_rows(source, files, folder, skip_malformed, streaming)
    else:
        looks_local = root.suffix or root.is_absolute() or source.path.startswith((".", "~"))
        if looks_local or source.path.count("/") > 1:
            raise InputError(f"`path` of a source must be a file, a directory or a hub id, got {source.path!r}.")
        builder = _hub_builder(source)
    if streaming:
        return builder.as_streaming_dataset(split=source.split)
    builder.download_and_prepare()
    return builder.as_dataset(split=source.split)


def _hub_builder(source: Source) -> Any:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(source.path, source.subset, revision=source.revision)
    if getattr(builder.config, "on_mixed_types", None) is None:
        return builder
    # Otherwise one number among the texts of a JSON file turns its neighbours into JSON, in silence.
    return load_dataset_builder(source.path, source.subset, revision=source.revision, on_mixed_types=None)


def _text_rows(
    source: Source, files: Mapping[str, list[str]], folder: str, skip_malformed: bool, streaming: bool
) -> Any:
    """Return the rows of JSON and CSV files, what is wrong with them marked in columns of their own."""
    from datasets import Dataset, Features, IterableDataset, Value

    names = list(dict.fromkeys(part.partition("[")[0].strip() for part in source.split.split("+")))
    for name in names:
        if name not in files:
            raise InputError(f"{source.path}: split {name!r} is missing; the splits are {sorted(files)}.")
        for file in files[name]:
            if _format(Path(file)) not in TEXT_FORMATS:
                raise InputError(f"{file} must end in one of {sorted(TEXT_FORMATS)}, as the other files do.")
    columns = [*source.needed, NOT_TEXT]
    features = Features({**{name: Value("string") for name in columns}, MALFORMED: Value("bool")})
    # Of lists, each item would be a shard: files are.
    fixed = {"needed": tuple(source.needed), "numbers": tuple(source.numbers), "skip_malformed": skip_malformed}
    if streaming:
        arguments = {"files": [file for name in names for file in files[name]], **fixed}
        return IterableDataset.from_generator(text_rows, features=features, gen_kwargs=arguments)
    splits = {}
    for name in names:
        arguments = {"files": files[name], **fixed}
        splits[name] = Dataset.from_generator(text_rows, features=features, gen_kwargs=arguments, cache_dir=folder)
    return _part(source, splits)


def _part(source: Source, splits: Mapping[str, Any]) -> Any:
    """Take what ``split`` says, which may be a part of one, out of whole splits."""
    from datasets import ReadInstruction, concatenate_datasets

    lengths = {name: len(rows) for name, rows in splits.items()}
    parts = [p for p in ReadInstruction.from_spec(source.split).to_absolute(lengths) if p.from_ < p.to]
    if not parts:
        raise InputError(f"{source.path}: split {source.split!r} has no rows.")
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _saved(source: Source, saved: Any, streaming: bool) -> Any:
    """Take the split out of what ``save_to_disk`` wrote."""
    if isinstance(saved, dict):
        if source.split not in saved:
            raise InputError(f"{source.path}: split {source.split!r} is missing; the splits are {sorted(saved)}.")
        saved = saved[source.split]
    elif source.split != "train":
        raise InputError(f"{source.path} is one dataset, whose `split` must be `train`, got {source.split!r}.")
    return saved.to_iterable_dataset() if streaming else saved


def _format(path: Path) -> str:
    kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    formats = TEXT_FORMATS if path.name.lower().endswith(".gz") else (*TEXT_FORMATS, *_TABLE_FORMATS)
    if kind not in formats:
        raise InputError(
            f"a source's file must end in one of {sorted([*TEXT_FORMATS, *_TABLE_FORMATS])} (texts also in .gz), "
            f"got {str(path)!r}."
        )
    return kind


def read_batches(source: Source, rows: Any, size: int) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of a source's rows, ``size`` rows at a time.

    Raises:
        InputError: If the file breaks off or is not what it seemed to be.

    Example:
        >>> batches = read_batches(Source(path="openai/gsm8k"), [], 8)  # lazy
    """
    marks = [name for name in (NOT_TEXT, MALFORMED) if name in (rows.column_names or ())]
    try:
        yield from rows.select_columns([*source.needed, *marks]).iter(batch_size=size)
    except Exception as error:
        raise InputError(_diagnosis(source, error)) from None


def _diagnosis(source: Source, error: Exception) -> str:
    """Return one line that says what is wrong with a source, and where."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, InputError):
        return str(cause)
    details = getattr(cause, "details", None)  # of files with other columns than the first
    reason = details() if callable(details) else next((line for line in str(cause).splitlines() if line.strip()), "")
    return f"{source.path} (split {source.split!r}) cannot be read: {type(cause).__name__} {reason[:300]}"
