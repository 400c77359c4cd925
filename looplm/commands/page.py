"""The comparison of runs as one HTML file that needs no network: figures inside it, the table sorted by a click.

Knows groups of curves and figures as PNG bytes; reads and trains nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files
from typing import Any

import looplm
from looplm.commands.curves import Group

__all__ = ["COLUMNS", "Column", "Picture", "make_pictures", "render_page"]

Spread = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A quantity of a group in the table.

    Example:
        >>> from looplm.commands.curves import Curve
        >>> measured = {"depths": [1, 4], "exact_match": [0.0, 0.75], "token_accuracy": [0.5, 1.0]}
        >>> group = Group(name="a", runs=[Curve(name="a_seed0", mean_depth=4.0, **measured)])
        >>> peak = Column(key="peak", title="peak (%)", value=lambda group: group.peak, scale=100)
        >>> f"{peak.title}: {peak.value(group)[0] * peak.scale:{peak.form}}"
        'peak (%): 75.0'
    """

    key: str
    """Name in ``robustness.csv``."""
    title: str
    """Name and unit on the page."""
    value: Callable[[Group], Spread | None]
    """Mean, least and greatest over the group's runs."""
    scale: float = 1.0
    """Factor on the page only."""
    form: str = ".1f"
    """Format on the page."""


COLUMNS = (
    Column(key="robustness", title="area to 8× (%)", value=lambda group: group.robustness, scale=100),
    Column(key="exact_match_16x", title="exact match at 16× (%)", value=lambda group: group.at_multiple(16), scale=100),
    Column(key="exact_match_8x", title="at 8× (%)", value=lambda group: group.at_multiple(8), scale=100),
    Column(key="peak", title="peak (%)", value=lambda group: group.peak, scale=100),
    Column(key="escapes", title="escapes (%)", value=lambda group: group.escapes, scale=100, form=".2f"),
    Column(
        key="spectral_radius",
        title="spectral radius ρ, deepest",
        value=lambda group: group.deepest("spectral_radius"),
        form=".3g",
    ),
    Column(key="mean_gain", title="mean gain, deepest", value=lambda group: group.deepest("mean_gain"), form=".3g"),
    Column(key="residual", title="residual, deepest", value=lambda group: group.deepest("residual"), form=".2g"),
)
"""What the table shows of each group, beside its name, its number of runs and its mean trained depth."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the page.

    Example:
        >>> from looplm.group_figures import bands_by_depth
        >>> figure = bands_by_depth({"a": [([1, 4], [0.0, 100.0])]}, title="Exact match", ylabel="exact match (%)")
        >>> Picture(name="match", heading="Exact match", caption="By depth.", figure=figure).png[1:4]
        b'PNG'
    """

    name: str
    """Stem of its PNG file."""
    heading: str
    """Above it."""
    caption: str
    """What it shows, in words; also its text for those who do not see it."""
    figure: Any
    """What :mod:`looplm.group_figures` drew."""

    @cached_property
    def png(self) -> bytes:
        """The figure as a PNG file; drawn once, which takes about a second."""
        data = io.BytesIO()
        self.figure.savefig(data, format="png", dpi=120)
        return data.getvalue()


# quantity: (axis label, logarithmic, value to mark, sentence)
_QUANTITIES: dict[str, tuple[str, bool, float | None, str]] = {
    "residual": ("residual ‖Φ(h)−h‖/‖Φ(h)‖", True, None, "It falls towards 0 where the loop converges."),
    "spectral_radius": ("spectral radius ρ", False, 1.0, "Below 1 a small error dies out in the long run."),
    "mean_gain": ("mean gain E‖Jv‖²", True, 1.0, "What the Jacobian penalty lowers: below 1 a random error shrinks."),
    "spectral_norm": ("spectral norm ‖J‖", True, 1.0, "Below 1 every error shrinks in every loop."),
    "lyapunov_exponent": (
        "Lyapunov exponent (nats per loop)",
        False,
        0.0,
        "Below 0 nearby paths come together.",
    ),
    "state_norm": ("state norm ‖h‖", True, None, "It grows where no norm bounds the state."),
}


def _deepest_points(group: Group, quantity: str) -> list[tuple[float, float]]:
    pairs = [(run.deepest(quantity), run.at_multiple(16)) for run in group.runs]
    return [(x, 100 * y) for x, y in pairs if x is not None and y is not None]


def make_pictures(groups: Sequence[Group]) -> list[Picture]:
    """Draw the curves, then each stability quantity that some run has, then stability against accuracy.

    Args:
        groups: In the order in which they are shown.

    Example:
        >>> from looplm.commands.curves import Curve
        >>> measured = {"depths": [1, 4], "exact_match": [0.0, 1.0], "token_accuracy": [0.5, 1.0]}
        >>> groups = [Group(name="a", runs=[Curve(name="a_seed0", mean_depth=4.0, **measured)])]
        >>> [picture.name for picture in make_pictures(groups)]
        ['comparison']
    """
    from looplm.group_figures import bands_by_depth, numbered_points

    pictures = [
        Picture(
            name="comparison",
            heading="Accuracy by depth",
            caption="Exact match at every evaluated depth; the dotted line is the mean trained depth.",
            figure=bands_by_depth(
                {
                    group.name: [(run.depths, [100 * value for value in run.exact_match]) for run in group.runs]
                    for group in groups
                },
                title="Exact match by depth",
                ylabel="exact match (%)",
                limits=(-3, 103),
                marks={group.name: group.mean_depth for group in groups if group.mean_depth is not None},
            ),
        )
    ]
    escaped = {
        group.name: [(run.depths, [100 * v for v in run.escaped]) for run in group.runs if run.escaped]
        for group in groups
    }
    if any(escaped.values()):
        title = "Escapes by depth"
        most = max(value for runs in escaped.values() for _, values in runs for value in values)
        top = max(1.0, 1.1 * most)
        figure = bands_by_depth(
            {name: runs for name, runs in escaped.items() if runs},
            title=title,
            ylabel="right before, wrong since (%)",
            limits=(-0.03 * top, top),
        )
        caption = f"{title}: problems whose answer has been right at some depth and wrong at a later one."
        pictures.append(Picture(name="escapes", heading=title, caption=caption, figure=figure))
    for quantity, (label, log_scale, threshold, sentence) in _QUANTITIES.items():
        known = {
            group.name: [
                ([int(depth) for depth in run.dynamics["depth"]], run.dynamics[quantity])
                for run in group.runs
                if quantity in run.dynamics
            ]
            for group in groups
        }
        known = {name: runs for name, runs in known.items() if runs}
        if not known:
            continue
        title = quantity.replace("_", " ").capitalize()
        figure = bands_by_depth(
            known, title=f"{title} by depth", ylabel=label, log_scale=log_scale, threshold=threshold
        )
        pictures.append(Picture(name=quantity, heading=title, caption=f"{title} by depth. {sentence}", figure=figure))
    for quantity in ("spectral_radius", "mean_gain"):
        points = {group.name: _deepest_points(group, quantity) for group in groups}
        if not any(points.values()):
            continue
        label, log_scale, threshold, _ = _QUANTITIES[quantity]
        title = f"Exact match against {quantity.replace('_', ' ')}"
        figure = numbered_points(
            points,
            title=title,
            xlabel=f"{label} at the deepest evaluated state",
            ylabel="exact match at 16 × mean trained depth (%)",
            limits=(-3, 103),
            threshold=threshold,
            log_scale=log_scale,
        )
        caption = f"{title}, one mark a run; the numbers are those of the table when it is sorted by area."
        pictures.append(Picture(name=f"accuracy_{quantity}", heading=title, caption=caption, figure=figure))
    return pictures


def _cell(group: Group, column: Column) -> str:
    spread = column.value(group)
    if spread is None:
        return '<td class="number">–</td>'
    mean, least, greatest = (f"{value * column.scale:{column.form}}" for value in spread)
    extent = f' <span class="spread">{least} to {greatest}</span>' if len(group.runs) > 1 else ""
    return f'<td class="number" data-value="{spread[0]!r}">{mean}{extent}</td>'


def _table(groups: Sequence[Group]) -> str:
    columns = [column for column in COLUMNS if any(column.value(group) is not None for group in groups)]
    titles = ["#", "run", "runs", "mean trained depth", *(column.title for column in columns)]
    order = {"area to 8× (%)": "descending"}
    head = "".join(
        f'<th scope="col" aria-sort="{order.get(title, "none")}"><button type="button">{escape(title)}</button></th>'
        for title in titles
    )
    rows = []
    for index, group in enumerate(groups, start=1):
        depth = group.mean_depth
        shown = "–" if depth is None else f"{depth:.3g}"
        value = "" if depth is None else f' data-value="{depth!r}"'
        cells = "".join(_cell(group, column) for column in columns)
        rows.append(
            f'<tr><td class="number" data-value="{index}">{index}</td><th scope="row">{escape(group.name)}</th>'
            f'<td class="number" data-value="{len(group.runs)}">{len(group.runs)}</td>'
            f'<td class="number"{value}>{shown}</td>{cells}</tr>'
        )
    body = "".join(rows)
    return f'<div class="wide"><table id="ranking"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = escape(picture.caption)
    return (
        f"<section><h2>{escape(picture.heading)}</h2><figure>"
        f'<img id="{escape(picture.name)}" alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure></section>"
    )


def render_page(groups: Sequence[Group], pictures: Sequence[Picture]) -> str:
    """Return the page.

    Args:
        groups: Groups of runs, the most depth-robust first.
        pictures: Figures, in order.

    Example:
        >>> from looplm.commands.curves import Curve
        >>> measured = {"depths": [1, 4], "exact_match": [0.0, 1.0], "token_accuracy": [0.5, 1.0]}
        >>> groups = [Group(name="a", runs=[Curve(name="a_seed0", mean_depth=4.0, **measured)])]
        >>> "<title>looplm: 1 run in 1 group</title>" in render_page(groups, pictures=[])
        True
    """
    num_runs = sum(len(group.runs) for group in groups)
    summary = f"{num_runs} run{'s' * (num_runs != 1)} in {len(groups)} group{'s' * (len(groups) != 1)}"
    sections = "".join(map(_section, pictures))
    return _PAGE.format(
        summary=summary,
        order=_BY_ROBUSTNESS if any(group.robustness for group in groups) else "Sorted by the best exact match.",
        version=escape(looplm.__version__),
        style=files("looplm.commands").joinpath("page.css").read_text(encoding="utf-8"),
        table=_table(groups),
        sections=sections,
        script=_SCRIPT,
    )


# The policy makes the browser itself refuse whatever would need a network.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>looplm: {summary}</title>
<style>
{style}
.spread {{ color: var(--quiet); font-size: .8em; display: block; }}
thead button {{ font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer;
 text-align: left; color: var(--link); }}
th[aria-sort=descending] button::after {{ content: " ▼"; }} th[aria-sort=ascending] button::after {{ content: " ▲"; }}
img {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{summary}</h1>
<p>{order} Each number is the mean over a group's runs (seeds), beside it the least and the
greatest. Escapes are problems whose answer was right at one depth and wrong at a later one. “Deepest” is the deepest
state whose dynamics were measured. A click on a heading sorts by it.</p>
{table}
{sections}
<footer><p>looplm {version}</p></footer>
<script>{script}</script>
</body>
</html>
"""

_BY_ROBUSTNESS = """\
Sorted by depth-robustness: the area under the exact match from the first evaluated depth to 8 × the mean trained
depth, by the trapezoid rule over depth, as a share of the largest possible area. 16× is 16 times the mean trained
depth, linear between evaluated depths."""

_SCRIPT = """
"use strict";
const table = document.getElementById("ranking");
const heads = [...table.tHead.rows[0].cells];
heads.forEach((head, column) => head.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
  const value = (row) => {
    const cell = row.cells[column];
    if (cell.tagName === "TH") return cell.textContent;
    return "value" in cell.dataset ? Number(cell.dataset.value) : null;
  };
  const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
  heads.forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
}));
"""
