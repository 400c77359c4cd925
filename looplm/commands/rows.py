"""One CSV row for each finished run, appended so that a reader or a crash never sees half of one.

Knows curves and files; trains nothing and draws nothing.
"""

from __future__ import annotations

import csv
import fcntl
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from looplm.commands.curve_files import has_columns
from looplm.commands.curves import DYNAMICS, Curve
from looplm.errors import InputError

__all__ = ["COLUMNS", "append_row", "is_rows_file", "read_rows"]

COLUMNS = (
    "run",
    "seed",
    "config_sha256",
    "code_sha256",
    "version",
    "mean_depth",
    "depths",
    "exact_match",
    "token_accuracy",
    "settled",
    "escaped",
    "dynamics_depths",
    *DYNAMICS,
)
"""Columns; those that hold a list have it separated by spaces."""

Key = tuple[str, str]


def is_rows_file(path: Path) -> bool:
    """Return whether a file begins with the header of this format.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
        >>> _ = path.write_text(",".join(COLUMNS))
        >>> is_rows_file(path), is_rows_file(path.with_name("nothing.csv"))
        (True, False)
    """
    return has_columns(path, COLUMNS)


def _key(row: Mapping[str, str]) -> Key:
    return row["run"], row["config_sha256"]  # the hash covers the seed


def _join(values: Sequence[float]) -> str:
    return " ".join(f"{value:.7g}" for value in values)


def _parse(row: Mapping[str, str]) -> Curve:
    def numbers(name: str) -> list[float]:
        return [float(value) for value in row[name].split()]

    depths = [int(value) for value in row["depths"].split()]
    at_depth = {name: numbers(name) for name in ("exact_match", "token_accuracy")}
    at_depth |= {name: numbers(name) for name in ("settled", "escaped") if row[name]}
    dynamics = {name: numbers(name) for name in DYNAMICS if row[name]}
    if dynamics:
        dynamics = {"depth": numbers("dynamics_depths"), **dynamics}
    if not depths or any(len(values) != len(depths) for values in at_depth.values()):
        raise ValueError("its lists differ in length")
    if any(len(values) != len(dynamics["depth"]) for values in dynamics.values()):
        raise ValueError("its lists of dynamics differ in length")
    return Curve(
        name=row["run"],
        depths=depths,
        mean_depth=float(row["mean_depth"]) if row["mean_depth"] else None,
        dynamics=dynamics,
        **at_depth,
    )


def read_rows(path: Path) -> dict[Key, Curve]:
    """Read the rows by (run, config_sha256); none if there is no such file.

    Raises:
        InputError: Names the file and the row that is damaged.

    Example:
        >>> read_rows(Path("not_there.csv"))  # for rows that are there see append_row
        {}
    """
    if not path.exists():
        return {}
    if path.is_file() and path.stat().st_size and not is_rows_file(path):
        raise InputError(f"{path} must have the columns {', '.join(COLUMNS)}; name another file.")
    rows: dict[Key, Curve] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows[_key(row)] = _parse(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f"{path}: row {len(rows) + 1} is no row of a run: {error}.") from None
    return rows


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # The folder, not the file: the file is replaced, and a lock file beside it would be one more thing to commit.
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def append_row(path: Path, curve: Curve, stamp: Mapping[str, str], seed: str) -> bool:
    """Append the row of a run, unless there is one of the same run and config.

    The file is replaced by a longer one: at any moment it holds whole rows, and two writers wait for each other.

    Args:
        path: The CSV file; made, with its folder, if there is none.
        curve: What the run left.
        stamp: See :func:`~looplm.commands.runs.run_stamp`.
        seed: Seed of the run.

    Returns:
        Whether a row was added.

    Raises:
        InputError: If the file cannot be written, or is something else.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
        >>> measured = {"depths": [1, 4], "exact_match": [0.0, 1.0], "token_accuracy": [0.5, 1.0]}
        >>> curve = Curve(name="a_seed0", mean_depth=4.0, **measured)
        >>> stamp = {"config_sha256": "2f1c", "code_sha256": "9b07", "version": "0.1"}
        >>> [append_row(path, curve, stamp, seed="0") for _ in range(2)]
        [True, False]
        >>> read_rows(path)["a_seed0", "2f1c"].exact_match
        [0.0, 1.0]
    """
    dynamics = {name: _join(curve.dynamics[name]) for name in DYNAMICS if name in curve.dynamics}
    row = {
        "run": curve.name,
        "seed": seed,
        **stamp,
        "mean_depth": "" if curve.mean_depth is None else f"{curve.mean_depth:.7g}",
        "depths": " ".join(map(str, curve.depths)),
        "exact_match": _join(curve.exact_match),
        "token_accuracy": _join(curve.token_accuracy),
        "settled": _join(curve.settled or ()),
        "escaped": _join(curve.escaped or ()),
        "dynamics_depths": _join([d for d in curve.dynamics.get("depth", ()) if math.isfinite(d)]),
        **dynamics,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            if _key(row) in read_rows(path):
                return False
            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=COLUMNS, restval="", lineterminator="\n")
            before = path.read_bytes() if path.exists() else b""
            if not before:
                writer.writeheader()
            elif not before.endswith(b"\n"):
                before += b"\n"
            writer.writerow(row)
            part = path.with_name(f".{path.name}.part")
            part.write_bytes(before + text.getvalue().encode())
            os.replace(part, path)
    except OSError as error:
        raise InputError(f"rows file {str(path)!r} cannot be written: {error.strerror}.") from None
    return True
