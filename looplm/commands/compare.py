"""``compare``: the curves of several runs in one table, one picture, CSV files and one HTML page.

Runs called NAME_seed0, NAME_seed1, … are one group: their mean, and the band from the least to the greatest.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from looplm.commands.arguments import Parser
from looplm.commands.curve_files import COMPARISON_COLUMNS, is_comparison, is_outdated, read_comparison, read_curve
from looplm.commands.curves import Curve, Group, group_runs
from looplm.commands.graded import read_graded, write_graded
from looplm.commands.messages import nearest_path
from looplm.commands.next_step import explore_line
from looplm.commands.page import COLUMNS, make_pictures, render_page
from looplm.commands.rows import is_rows_file, read_rows
from looplm.errors import InputError

__all__ = ["make_parser", "run", "write_comparison"]

_EXAMPLES = """\
examples:
  python -m looplm compare runs/stars runs/fixed_depth
  python -m looplm compare runs/*_seed* --output runs/all
  python -m looplm compare data/study.csv
"""

_MOST_ROWS = 24
_MOST_COLUMNS = 8


def _shown_depths(curves: Sequence[Curve]) -> list[int]:
    """Return all depths if they are few, else powers of two, tens and hundreds, and the last."""
    every = sorted({depth for curve in curves for depth in curve.depths})
    if len(every) <= _MOST_ROWS:
        return every
    return [d for d in every if d == every[-1] or d & (d - 1) == 0 or str(d).rstrip("0") == "1"]


def _compare(runs: Sequence[Path], output: Path) -> Path:
    """Print the table of several runs and write the files of :func:`write_comparison`.

    Run directories with graded answers get :func:`~looplm.commands.graded.write_graded` as well.

    Args:
        runs: Run directories, curves' CSV files, or files that hold many runs each: rows of ``sweep``, and the
            ``comparison.csv`` of an earlier ``compare``.
        output: The folder to write to.

    Returns:
        The path of the picture.

    Raises:
        InputError: If a run is missing or has no curve, or two runs have the same name.
    """
    curves: list[Curve] = []
    for path in runs:
        if not path.exists():
            hint = nearest_path(path) or "; `python -m looplm fit` and `test` make one."
            raise InputError(f"run {str(path)!r} does not exist{hint}")
        if path.is_file() and is_rows_file(path):
            curves += read_rows(path).values()
        elif path.is_file() and is_comparison(path):
            curves += read_comparison(path)
        else:
            curves.append(read_curve(path))
            if is_outdated(path):
                sys.stderr.write(f"looplm: warning: {path} was trained again after its `test`: test_curve.csv is old\n")
    graded = [curve for path in runs if path.is_dir() for curve in read_graded(path)]
    picture = write_comparison(curves, output)
    if graded:
        write_graded(graded, output)
    return picture


def write_comparison(curves: Sequence[Curve], output: Path) -> Path:
    """Print the table and write ``comparison.csv``, ``robustness.csv``, ``comparison.html`` and PNG figures.

    ``comparison.png`` is always there; figures of the dynamics only where a run has them.

    Args:
        curves: One for each run.
        output: The folder to write to.

    Returns:
        The path of the picture.

    Raises:
        InputError: If there is no run, two have the same name, or the folder cannot be written.

    Example:
        >>> import contextlib, io, tempfile
        >>> curve = Curve(name="a", depths=[1, 4], exact_match=[0.0, 1.0], token_accuracy=[0.5, 1.0], mean_depth=4.0)
        >>> with contextlib.redirect_stdout(io.StringIO()):
        ...     picture = write_comparison([curve], Path(tempfile.mkdtemp()))
        >>> sorted(path.name for path in picture.parent.iterdir())
        ['comparison.csv', 'comparison.html', 'comparison.png', 'robustness.csv']
    """
    from rich.console import Console

    names = [curve.name for curve in curves]
    if not names or len(set(names)) != len(names):
        raise InputError(f"runs must have different names, got {names}.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(output)!r} must be a folder that can be written: {error.strerror}.") from None
    groups = group_runs(curves)
    _write_curves(curves, output / "comparison.csv")
    _write_robustness(groups, output / "robustness.csv")
    pictures = make_pictures(groups)
    for picture in pictures:
        (output / f"{picture.name}.png").write_bytes(picture.png)
    page = output / "comparison.html"
    page.write_text(render_page(groups, pictures), encoding="utf-8")
    if len(curves) <= _MOST_COLUMNS:
        _print_depths(curves)
    else:
        _print_ranking(groups)
    picture_path = output / "comparison.png"
    Console().print(
        f"picture: {picture_path}\ntable:   {output / 'comparison.csv'}\npage:    {page}",
        highlight=False,
        soft_wrap=True,
    )
    return picture_path


def _write_curves(curves: Sequence[Curve], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COMPARISON_COLUMNS)
        for curve in curves:
            columns = (curve.depths, curve.exact_match, curve.token_accuracy)
            writer.writerows([curve.name, *row] for row in zip(*columns, strict=True))


def _write_robustness(groups: Sequence[Group], path: Path) -> None:
    """Write the page's table: for each quantity mean, least and greatest over a group's runs, empty where unknown."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        heads = [f"{column.key}{suffix}" for column in COLUMNS for suffix in ("", "_min", "_max")]
        writer.writerow(["rank", "run", "num_runs", "mean_depth", *heads])
        for rank, group in enumerate(groups, start=1):
            spreads = [column.value(group) or ("", "", "") for column in COLUMNS]
            depth = "" if group.mean_depth is None else group.mean_depth
            writer.writerow(
                [rank, group.name, len(group.runs), depth, *(value for three in spreads for value in three)]
            )


def _print_depths(curves: Sequence[Curve]) -> None:
    """Print one column a run and one row a depth."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Exact match (%) by depth")
    table.add_column("depth", justify="right")
    for curve in curves:
        table.add_column(Text(curve.name), justify="right", overflow="fold")
    values = [dict(zip(curve.depths, curve.exact_match, strict=True)) for curve in curves]
    for depth in _shown_depths(curves):
        table.add_row(f"{depth:,}", *(f"{100 * value[depth]:.1f}" if depth in value else "" for value in values))
    table.add_section()
    table.add_row("peak", *(f"{100 * max(value.values()):.1f}" for value in values))
    Console().print(table)


def _print_ranking(groups: Sequence[Group]) -> None:
    """Print one row a group, the most depth-robust first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = COLUMNS[:4]
    table = Table(title="Depth-robustness: mean over runs")
    table.add_column("run", overflow="fold")
    for column in shown:
        table.add_column(column.title, justify="right")
    for group in groups:
        spreads = [(column, column.value(group)) for column in shown]
        cells = ["–" if spread is None else f"{spread[0] * column.scale:{column.form}}" for column, spread in spreads]
        table.add_row(Text(group.name), *cells)
    Console().print(table)


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("compare", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directory, a curve's CSV file, a rows file of sweep, or a comparison.csv",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder to write to")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    args = make_parser().parse_args(argv)
    _compare(args.runs, args.output)
    sys.stdout.write(explore_line(args.runs))
    return 0
