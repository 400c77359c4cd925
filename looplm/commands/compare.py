"""``compare``: the curves of several runs in one table, one CSV and one picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from looplm.commands.arguments import Parser
from looplm.errors import InputError

__all__ = ["Curve", "compare", "read_curve", "run"]

_MOST_ROWS = 24


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy by depth of one run, as read from its directory."""

    name: str
    depths: list[int]
    exact_match: list[float]
    token_accuracy: list[float]
    mean_depth: float | None


def read_curve(run_dir: Path) -> Curve:
    """Read the test curve of a run (else its validation curve).

    Args:
        run_dir: A run directory, or a curve's CSV file.

    Raises:
        InputError: If there is none, or it is damaged.
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
        rows = [row for row in rows if row["split"] == rows[0]["split"]]
        depths = [int(row["depth"]) for row in rows]
        exact_match, token_accuracy = ([float(row[name]) for row in rows] for name in ("exact_match", "token_accuracy"))
        if not rows:
            raise ValueError("it has no rows")
    except (ValueError, KeyError, TypeError, csv.Error, OSError) as error:
        raise InputError(f"{path} is no curve: {error}.") from None
    mean_depth = None
    summary = path.with_name(path.name.replace("_curve.csv", "_summary.json"))
    if summary != path and summary.is_file():
        try:
            mean_depth = json.loads(summary.read_text(encoding="utf-8")).get(rows[0]["split"], {}).get("mean_depth")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{summary} is no summary of a curve: {error}.") from None
    name = path.stem if run_dir.is_file() else run_dir.resolve().name
    return Curve(
        name=name, depths=depths, exact_match=exact_match, token_accuracy=token_accuracy, mean_depth=mean_depth
    )


def _shown_depths(curves: Sequence[Curve]) -> list[int]:
    """Return all depths if they are few, else powers of two, tens and hundreds, and the last."""
    every = sorted({depth for curve in curves for depth in curve.depths})
    if len(every) <= _MOST_ROWS:
        return every
    return [d for d in every if d == every[-1] or d & (d - 1) == 0 or str(d).rstrip("0") == "1"]


def compare(run_dirs: Sequence[Path], output: Path) -> Path:
    """Print the table of several runs and write ``comparison.csv`` and ``comparison.png``.

    Args:
        run_dirs: Run directories.
        output: The folder to write to.

    Returns:
        The path of the picture.

    Raises:
        InputError: If a run has no curve, or two runs have the same name.
    """
    from rich.console import Console
    from rich.table import Table

    from looplm.figures import depth_curves

    curves = [read_curve(path) for path in run_dirs]
    names = [curve.name for curve in curves]
    if len(set(names)) != len(names):
        raise InputError(f"runs must have different names, got {names}.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(output)!r} must be a folder that can be written: {error.strerror}.") from None
    with (output / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "depth", "exact_match", "token_accuracy"])
        for curve in curves:
            columns = (curve.depths, curve.exact_match, curve.token_accuracy)
            writer.writerows([curve.name, *row] for row in zip(*columns, strict=True))
    picture = output / "comparison.png"
    depth_curves(
        {curve.name: (curve.depths, curve.exact_match) for curve in curves},
        mean_depths={curve.name: curve.mean_depth for curve in curves if curve.mean_depth is not None},
    ).savefig(picture, dpi=150)

    table = Table(title="Exact match (%) by depth")
    table.add_column("depth", justify="right")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    values = [dict(zip(curve.depths, curve.exact_match, strict=True)) for curve in curves]
    for depth in _shown_depths(curves):
        table.add_row(f"{depth:,}", *(f"{100 * value[depth]:.1f}" if depth in value else "" for value in values))
    table.add_section()
    table.add_row("peak", *(f"{100 * max(value.values()):.1f}" for value in values))
    Console().print(table)
    Console().print(f"picture: {picture}\ntable:   {output / 'comparison.csv'}", highlight=False, soft_wrap=True)
    return picture


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    parser = Parser("compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or a curve's CSV file")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder to write to")
    args = parser.parse_args(argv)
    compare(args.runs, args.output)
    return 0
