"""The files in which runs leave their curves: one run's own, and the table of several that ``compare`` writes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from looplm.commands.curves import DYNAMICS, Curve
from looplm.errors import InputError

__all__ = [
    "COMPARISON_COLUMNS",
    "describe_curves",
    "has_columns",
    "is_comparison",
    "is_outdated",
    "read_comparison",
    "read_curve",
    "read_dynamics",
]


_CURVE_COLUMNS = ("split", "depth", "exact_match", "token_accuracy")


def read_curve(run_dir: Path) -> Curve:
    r"""Read the test curve of a run (else its validation curve), and its dynamics if there are any.

    Args:
        run_dir: A run directory, or a curve's CSV file.

    Raises:
        InputError: If there is none, or it is damaged.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> rows = "split,depth,exact_match,token_accuracy\ntest,1,0.0,0.5\ntest,4,1.0,1.0\n"
        >>> _ = (run / "test_curve.csv").write_text(rows)
        >>> read_curve(run).exact_match
        [0.0, 1.0]
    """
    candidates = [run_dir] if run_dir.is_file() else [run_dir / f"{stage}_curve.csv" for stage in ("test", "val")]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise InputError(f"{run_dir} has no test_curve.csv or val_curve.csv; run `python -m looplm test` first.")
    path = found[0]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        # A file with several evaluation sets begins with the main one.
        missing = [name for name in _CURVE_COLUMNS if rows and name not in rows[0]]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
        rows = [row for row in rows if row["split"] == rows[0]["split"]]
        depths = [int(row["depth"]) for row in rows]
        exact_match, token_accuracy = ([float(row[name]) for row in rows] for name in ("exact_match", "token_accuracy"))
        if not rows:
            raise ValueError("it has no rows")
        # Tables written before these columns existed lack them.
        settling = {name: [float(row[name]) for row in rows] for name in ("settled", "escaped") if name in rows[0]}
    except (ValueError, KeyError, TypeError, csv.Error, OSError) as error:
        raise InputError(f"{path} is no curve: {error}.") from None
    return Curve(
        name=path.stem if run_dir.is_file() else run_dir.resolve().name,
        depths=depths,
        exact_match=exact_match,
        token_accuracy=token_accuracy,
        mean_depth=_read_mean_depth(path, rows[0]["split"]),
        settled=settling.get("settled"),
        escaped=settling.get("escaped"),
        dynamics=read_dynamics(path.with_name(path.name.replace("_curve.csv", "_dynamics.csv"))),
    )


def describe_curves(run_dir: Path, stage: str) -> list[str]:
    r"""Say in a line for each evaluation set what its curve comes to: its peak, its end, and what was lost on the way.

    Args:
        run_dir: A run directory in which ``{stage}_curve.csv`` stands.
        stage: ``val`` or ``test``.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> rows = "split,depth,exact_match,escaped\ntest,1,0.25,0.0\ntest,4,1.0,0.0\ntest,64,0.5,0.5\n"
        >>> _ = (run / "test_curve.csv").write_text(rows)
        >>> describe_curves(run, "test")
        ['exact match on test: at best 100.0 % (depth 4), 50.0 % at depth 64; right and then lost: 50.0 %']
    """
    by_split: dict[str, list[tuple[float, int, float]]] = {}
    with (run_dir / f"{stage}_curve.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = (float(row["exact_match"]), int(row["depth"]), float(row["escaped"]))
            by_split.setdefault(row["split"], []).append(values)
    lines = []
    for split, rows in by_split.items():
        (peak, depth, _), (last, deepest, escaped) = max(rows, key=lambda row: row[0]), rows[-1]
        end = "" if depth == deepest else f", {100 * last:.1f} % at depth {deepest:,}"
        lost = f"right and then lost: {100 * escaped:.1f} %"
        lines.append(f"exact match on {split}: at best {100 * peak:.1f} % (depth {depth:,}){end}; {lost}")
    return lines


def is_outdated(run_dir: Path) -> bool:
    """Return whether a run's ``test_curve.csv`` is older than its last checkpoint: of a model that is gone.

    Example:
        >>> is_outdated(Path("no/such/run"))
        False
    """
    curve, checkpoint = run_dir / "test_curve.csv", run_dir / "checkpoints" / "last.ckpt"
    return curve.is_file() and checkpoint.exists() and checkpoint.stat().st_mtime > curve.stat().st_mtime


COMPARISON_COLUMNS = ("run", "depth", "exact_match", "token_accuracy")
"""Columns of the ``comparison.csv`` that ``compare`` writes."""


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Return whether a CSV file begins with these columns and no others; False where there is no such file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.csv"
        >>> _ = path.write_text("run,depth")
        >>> has_columns(path, ["run", "depth"]), has_columns(path, ["run"])
        (True, False)
    """
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().strip() == ",".join(columns)
    except (OSError, UnicodeDecodeError):
        return False


def is_comparison(path: Path) -> bool:
    """Return whether a file begins as the table of curves that ``compare`` writes.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "comparison.csv"
        >>> _ = path.write_text("run,depth,exact_match,token_accuracy")
        >>> is_comparison(path), is_comparison(path.with_name("nothing.csv"))
        (True, False)
    """
    return has_columns(path, COMPARISON_COLUMNS)


def read_comparison(path: Path) -> list[Curve]:
    r"""Read the curves of several runs from a table that ``compare`` wrote; it holds no dynamics.

    Raises:
        InputError: Names the file and what is wrong with it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "comparison.csv"
        >>> _ = path.write_text("run,depth,exact_match,token_accuracy\na,1,0.5,0.8\nb,1,0.7,0.9\n")
        >>> [(curve.name, curve.exact_match) for curve in read_comparison(path)]
        [('a', [0.5]), ('b', [0.7])]
    """
    curves: dict[str, list[tuple[int, float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = (int(row["depth"]), float(row["exact_match"]), float(row["token_accuracy"]))
                curves.setdefault(row["run"], []).append(values)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is no table of curves: {error}.") from None
    found = []
    for name, rows in curves.items():
        depths, exact_match, token_accuracy = (list(column) for column in zip(*rows, strict=True))
        found.append(
            Curve(
                name=name,
                depths=depths,
                exact_match=exact_match,
                token_accuracy=token_accuracy,
                mean_depth=None,
            )
        )
    return found


def _read_mean_depth(curve: Path, split: str) -> float | None:
    summary = curve.with_name(curve.name.replace("_curve.csv", "_summary.json"))
    if summary == curve or not summary.is_file():
        return None
    try:
        mean_depth = json.loads(summary.read_text(encoding="utf-8")).get(split, {}).get("mean_depth")
        return None if mean_depth is None else float(mean_depth)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{summary} is no summary of a curve: {error}.") from None


def read_dynamics(path: Path) -> dict[str, list[float]]:
    r"""Read ``{stage}_dynamics.csv``: ``depth`` and those of ``DYNAMICS`` that it has; empty if there is no such file.

    Raises:
        InputError: If it has no depths, or a value is no number.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "test_dynamics.csv"
        >>> _ = path.write_text("depth,residual,spectral_radius\n1,0.5,0.9\n2,0.1,\n")
        >>> read_dynamics(path)
        {'depth': [1.0, 2.0], 'residual': [0.5, 0.1], 'spectral_radius': [0.9, nan]}
    """
    if not path.name.endswith("_dynamics.csv") or not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and "split" in rows[0]:
            rows = [row for row in rows if row["split"] == rows[0]["split"]]
        depths = [float(row["depth"]) for row in rows]
        # An empty cell is a quantity that was not computed at that depth.
        columns = {
            name: [float(row[name]) if row[name] else math.nan for row in rows]
            for name in DYNAMICS
            if rows and name in rows[0]
        }
    except (ValueError, KeyError, TypeError, csv.Error, OSError) as error:
        raise InputError(f"{path} is no table of dynamics: {error}.") from None
    kept = {name: values for name, values in columns.items() if any(map(math.isfinite, values))}
    return {"depth": depths, **kept} if kept else {}
