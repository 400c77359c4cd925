"""Where rows come from: local files and directories, saved datasets, the Hugging Face hub; read by ``datasets``.

Knows files and columns, no tokens. What cannot be read ends in one line that names file, row and column.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looplm.corpora.generated import generated_file, is_generated
from looplm.corpora.templates import placeholders
from looplm.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["MALFORMED", "Source", "content_key", "load_rows", "read_batches"]

MALFORMED = "__malformed__"
"""A column that marks lines which are no row, where such are skipped."""

_FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "arrow": "arrow"}


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
        names = [name for column in self.columns.values() for name in placeholders(column) or [column]]
        return list(dict.fromkeys(names))


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
    """Return the rows of a source, all their columns.

    Args:
        source: The source.
        cache_dir: Where ``datasets`` keeps what it has read.
        skip_malformed: Whether a line of a JSON file that is no row is marked in a column instead of refused.
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

    datasets.logging.set_verbosity_error()  # what it would log of a broken file is said in our error
    try:
        rows = _load(source, cache_dir, streaming)
        # A stream may not know its columns, or that it has no rows, before it is read.
        names = list(next(iter(rows), {})) if streaming else rows.column_names
    except InputError:
        raise
    except Exception as error:
        if skip_malformed and not streaming and _json_lines(source):
            rows = _salvaged(source, cache_dir)
            names = rows.column_names
        else:
            raise InputError(_diagnosis(source, error)) from None
    missing = [name for name in source.needed if name not in names]
    if missing and names:
        raise InputError(f"{source.path}: column {missing[0]!r} is missing; the columns are {sorted(names)}.")
    if not names or (not streaming and len(rows) == 0):
        raise InputError(f"{source.path}: split {source.split!r} has no rows.")
    return rows


def _load(source: Source, cache_dir: Path, streaming: bool) -> Dataset | IterableDataset:
    from datasets import load_dataset, load_from_disk

    root = source.root
    options: dict[str, Any] = {"split": source.split, "streaming": streaming}
    if source.is_file:
        kind = _format(root)
        # Otherwise "NA" is no text, "007" a number and "1.50" another one.
        texts = _text_columns(root) if kind == "csv" else {}
        folder = str(cache_dir / (content_key(source) or "")[:32]) if not streaming else None
        return load_dataset(kind, data_files=[str(root)], cache_dir=folder, **texts, **options)
    if root.is_dir():
        if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
            return _saved(source, load_from_disk(str(root)), streaming)
        folder = str(cache_dir / (content_key(source) or "")[:32]) if not streaming else None
        return load_dataset(str(root), cache_dir=folder, **options)
    looks_local = root.suffix or root.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1
    if looks_local:
        raise InputError(f"`path` of a source must be a file, a directory or a hub id, got {source.path!r}.")
    return load_dataset(source.path, source.subset, revision=source.revision, **options)


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
    kind = _FORMATS.get(path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1])
    if kind is None or (path.name.endswith(".gz") and kind not in ("json", "csv")):
        raise InputError(
            f"a source's file must end in one of {sorted(_FORMATS)} (texts also in .gz), got {str(path)!r}."
        )
    return kind


def _text_columns(path: Path) -> dict[str, Any]:
    """Return options that let every column of a CSV file be the text that stands there."""
    from datasets import Features, Value

    separator = "\t" if ".tsv" in path.name.lower() else ","
    with gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    features = Features({name: Value("string") for name in header})
    return {"sep": separator, "features": features, "keep_default_na": False}


def read_batches(source: Source, rows: Any, size: int) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of a source's rows, ``size`` rows at a time.

    Raises:
        InputError: If the file breaks off or is not what it seemed to be.

    Example:
        >>> batches = read_batches(Source(path="openai/gsm8k"), [], 8)  # lazy
    """
    names = [*source.needed, *([MALFORMED] if MALFORMED in (rows.column_names or ()) else [])]
    try:
        yield from rows.select_columns(names).iter(batch_size=size)
    except Exception as error:
        raise InputError(_diagnosis(source, error)) from None


def _json_lines(source: Source) -> bool:
    return source.is_file and _format(source.root) == "json"


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def _diagnosis(source: Source, error: Exception) -> str:
    """Return one line that says what is wrong with a source, and where."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if source.is_file:
        path = source.root
        if path.stat().st_size == 0:
            return f"{source.path}: the file is empty."
        if _json_lines(source):
            try:
                found = next(_bad_lines(path), None)
            except (OSError, EOFError, ValueError) as broken:
                return f"{source.path} cannot be read: {broken}."
            if found is not None:
                return f"{source.path}, line {found[0]}: {found[1]}."
    reason = next((line for line in str(cause).splitlines() if line.strip()), "")[:300]
    return f"{source.path} (split {source.split!r}) cannot be read: {type(cause).__name__} {reason}"


def _bad_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and fault of each line that is no JSON object; of a file that is one array, its own."""
    with _open(path) as file:
        if file.read(1) == b"[":
            file.seek(0)
            try:
                json.load(file)
            except ValueError as error:
                yield getattr(error, "lineno", 1), f"no JSON: {error}"
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            fault = _fault(line)
            if fault is not None:
                yield number, fault


def _fault(line: bytes) -> str | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line.strip())
    except UnicodeDecodeError as error:
        return f"no UTF-8: {error}"
    except ValueError as error:
        return f"no JSON: {error}"
    return None if isinstance(row, dict) else f"a row must be an object, got {type(row).__name__}"


def _salvaged(source: Source, cache_dir: Path) -> Any:
    """Return the rows of a JSON lines file, what is no row marked in the column ``MALFORMED``."""
    from datasets import Dataset, Features, Value

    features = Features({**{name: Value("string") for name in source.needed}, MALFORMED: Value("bool")})
    key = content_key(source) or ""
    arguments = {"path": source.path, "needed": tuple(source.needed), "key": key}  # a list would be shards
    folder = str(cache_dir / key[:32])
    return Dataset.from_generator(_salvage, features=features, gen_kwargs=arguments, cache_dir=folder)


def _salvage(path: str, needed: tuple[str, ...], key: str) -> Iterator[dict[str, Any]]:
    """Yield one row a line; ``key`` makes another content another dataset."""
    with _open(Path(path)) as file:
        for line in file:
            if not line.strip():
                continue
            row = json.loads(line) if _fault(line) is None else None
            if row is None or any(not isinstance(row.get(name), str | int | float | None) for name in needed):
                yield {**dict.fromkeys(needed), MALFORMED: True}
            else:
                yield {
                    **{name: None if row.get(name) is None else str(row[name]) for name in needed},
                    MALFORMED: False,
                }
