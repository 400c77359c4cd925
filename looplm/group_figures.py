"""Figures of groups of runs, for comparisons. Arrays in, figures out; knows no run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from looplm.figures import COLOURS, blank, canvas, depth_axis, line_style

if TYPE_CHECKING:
    from looplm.figures import Figure

__all__ = ["bands_by_depth", "numbered_points"]

_BAND = "least to greatest run"


def _plain(name: str, longest: int = 28) -> str:
    """Return a name as matplotlib shows it: ``$`` is no mathematics, and what is too long loses its middle."""
    if len(name) > longest:
        name = f"{name[: longest // 2]}…{name[-(longest // 2 - 1) :]}"
    return name.replace("$", r"\$")


def _over_runs(runs: Sequence[tuple[Sequence[int], Sequence[float]]]) -> tuple[np.ndarray, ...]:
    """Return the depths that all runs have, and mean, least and greatest of their values there; NaN where one is."""
    tables = [dict(zip(depths, values, strict=True)) for depths, values in runs]
    depths = sorted(set.intersection(*(set(table) for table in tables)))
    values = np.array([[table[depth] for depth in depths] for table in tables], dtype=float).reshape(len(tables), -1)
    values[~np.isfinite(values)] = np.nan
    return np.array(depths), values.mean(0), values.min(0), values.max(0)


def bands_by_depth(
    curves: Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]],
    *,
    title: str,
    ylabel: str,
    marks: Mapping[str, float] | None = None,
    limits: tuple[float, float] | None = None,
    log_scale: bool = False,
    threshold: float | None = None,
) -> Figure:
    """Draw a quantity by depth for groups of runs: mean over the runs, and the band from the least to the greatest.

    As long as colours tell them apart all groups share one pair of axes, else each has its own, the others in grey.

    Args:
        curves: For each group the depths and values of its runs; drawn where all runs have a finite value.
        title: Above the figure.
        ylabel: Name and unit of the quantity.
        marks: A depth to mark in some groups, the mean trained depth (loops).
        limits: Ends of the quantity's axis; None: what the values need.
        log_scale: Whether that axis is logarithmic; values <= 0 are left out then.
        threshold: A value to mark with a line.

    Returns:
        The figure, 8.5 × 4.5 inches, or four panels a row.

    Example:
        >>> runs = [([1, 64], [1.0, 0.9]), ([1, 64], [1.0, 0.8])]  # two seeds
        >>> figure = bands_by_depth({"stars": runs}, title="Exact match", ylabel="%")
    """
    bands = {name: _over_runs(runs) for name, runs in curves.items()}
    together = len(bands) <= len(COLOURS)
    num_rows = -(-len(bands) // 4)
    size = (8.5, 4.5) if together else (11.5, 1.75 * num_rows + 1.3)
    figure = blank(size)
    shape = (1, 1) if together else (num_rows, 4)
    grid = list(figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).flat)
    every = [int(depth) for depths, *_ in bands.values() for depth in depths] or [1]
    for axes in grid:
        depth_axis(axes, every)
        axes.grid(alpha=0.3)
        if limits is not None:
            axes.set_ylim(*limits)
        if log_scale:
            axes.set_yscale("log", nonpositive="mask")
        if threshold is not None:
            dashes = {"color": "black", "linewidth": 1, "linestyle": (0, (4, 3))}
            axes.axhline(threshold, label=f"{threshold:g}, marked", **dashes)
    for index, (name, (depths, mean, least, greatest)) in enumerate(bands.items()):
        axes = grid[0 if together else index]
        style = line_style(index, len(bands), mean) if together else {"color": COLOURS[0], "linewidth": 1.8}
        if not together:
            # One broken line: a line for each would be hundreds of objects, which take seconds to draw.
            x, y = (np.concatenate([[*band[axis], np.nan] for band in bands.values()]) for axis in (0, 1))
            axes.plot(x, y, color="0.82", linewidth=0.7, zorder=1, label="all others")
            axes.set_title(_plain(name), fontsize=9)
        axes.plot(depths, mean, label=_plain(name, 40) if together else "mean over its runs", zorder=3, **style)
        if len(curves[name]) > 1:
            shade = {"color": style["color"], "alpha": 0.25, "linewidth": 0, "label": _BAND}
            axes.fill_between(depths, least, greatest, zorder=2, **shade)
        if marks and name in marks:
            line = {"color": style["color"] if together else COLOURS[1], "linestyle": ":", "linewidth": 1.2}
            axes.axvline(marks[name], label="mean trained depth", **line)
    _label_grid(figure, grid, len(bands), title, ylabel, together=together, last=max(every))
    return figure


def _label_grid(
    figure: Figure, grid: Any, num_panels: int, title: str, ylabel: str, *, together: bool, last: int
) -> None:
    """Name axes once, thin out ticks that would touch, and put one legend beside or below all axes."""
    handles: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if together:
        grid[0].set_ylabel(ylabel)
        grid[0].set_title(title)
        figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
        return
    ticks = [0, *(4**k for k in range(last.bit_length()) if 4**k <= last)]
    for index, axes in enumerate(grid):
        is_lowest = num_panels - 4 <= index < num_panels
        axes.set_xlabel("depth (loops, log scale)" if is_lowest else "", fontsize=9)
        axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        axes.tick_params(which="both", labelsize=8, labelbottom=is_lowest)
        axes.set_visible(index < num_panels)
    figure.suptitle(title)
    figure.supylabel(ylabel, fontsize=10)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def numbered_points(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    limits: tuple[float, float] | None = None,
    threshold: float | None = None,
    log_scale: bool = False,
) -> Figure:
    """Draw points of groups of runs, one a run; each group is drawn as its number, which the legend beside resolves.

    Args:
        points: For each group the (x, y) of its runs; those that are not finite are left out.
        title: Above the figure.
        xlabel: Name and unit of x.
        ylabel: Name and unit of y.
        limits: Ends of the axis of y; None: what the values need.
        threshold: An x to mark with a line.
        log_scale: Whether the axis of x is logarithmic.

    Returns:
        The figure, 9.5 × 5.5 inches.

    Example:
        >>> figure = numbered_points({"stars": [(0.9, 99.0), (0.8, 98.0)]}, title="Stability", xlabel="ρ", ylabel="%")
    """
    figure, axes = canvas((9.5, 5.5))
    for index, (name, pairs) in enumerate(points.items()):
        kept = [(x, y) for x, y in pairs if np.isfinite(x) and np.isfinite(y) and (x > 0 or not log_scale)]
        style = {"color": COLOURS[index % len(COLOURS)], "marker": f"${index + 1}$", "s": 70 if index < 9 else 110}
        axes.scatter(*zip(*kept, strict=True) if kept else ((), ()), linewidths=0.3, label=_plain(name), **style)
    if log_scale:
        axes.set_xscale("log")
    if threshold is not None:
        axes.axvline(threshold, color="0.35", linewidth=1, linestyle=(0, (4, 3)), label=f"{threshold:g}, marked")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if limits is not None:
        axes.set_ylim(*limits)
    columns = 1 if len(points) <= 26 else 2
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=columns)
    return figure
