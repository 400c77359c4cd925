"""Curves by depth, and the parts of every figure: arrays in, figures out.

The only file that imports matplotlib; knows no model, no run and no logger.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Figure  # for the types of other files

__all__ = [
    "COLOURS",
    "MARKERS",
    "accuracy_and_stability",
    "accuracy_bands",
    "blank",
    "canvas",
    "depth_axis",
    "depth_curves",
    "draw",
    "encode_png",
    "line_style",
    "quantity_by_depth",
    "settling_by_depth",
]

# Okabe and Ito's palette, told apart by the colour-blind; line style and marker tell the curves apart in grey too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_PERCENT_LIMITS = (-3, 103)  # a line at 0 or 100 is seen whole
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DOTS_PER_INCH = 150


def depth_axis(axes: Axes, depths: Sequence[int]) -> None:
    """Show depth 0, 1, 2, 4, … at even distances.

    Example:
        >>> figure, axes = canvas()
        >>> depth_axis(axes, [0, 1, 4, 64])
    """
    axes.set_xscale("symlog", base=2, linthresh=1, linscale=1)
    last = max(depths)
    ticks = [0, *(2**k for k in range(last.bit_length()))]
    # Beyond 1,024 the labels would print over one another: every second power has one.
    apart = 1 if last <= 1024 else 2
    labels = [
        f"{tick:,}" if index == 0 or (len(ticks) - 1 - index) % apart == 0 else "" for index, tick in enumerate(ticks)
    ]
    axes.set_xticks(ticks, labels=labels)
    axes.set_xticks([], minor=True)
    axes.set_xlim(-0.15, last * 1.15)
    axes.set_xlabel("depth (loops, log scale)")


def blank(size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches.

    Example:
        >>> blank((4, 3)).get_size_inches().tolist()
        [4.0, 3.0]
    """
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def canvas(size: tuple[float, float] = (8, 4.5), projection: str | None = None) -> tuple[Figure, Any]:
    """Return a figure and its one pair of axes.

    Example:
        >>> figure, axes = canvas((4, 3))
        >>> _ = axes.plot([0, 1], [0, 1])
    """
    figure = blank(size)
    return figure, figure.add_subplot(projection=projection)


def draw(figure: Figure) -> np.ndarray:
    """Draw a figure at 150 dots an inch: uint8 ``(H, W, 4)``, red, green, blue and alpha.

    Example:
        >>> draw(blank((2, 1))).shape
        (150, 300, 4)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(_DOTS_PER_INCH)
    agg = FigureCanvasAgg(figure)
    agg.draw()
    return np.asarray(agg.buffer_rgba())


def encode_png(pixels: np.ndarray) -> bytes:
    """Return what :func:`draw` drew as a PNG file.

    Example:
        >>> encode_png(draw(blank((2, 1))))[1:4]
        b'PNG'
    """
    from matplotlib.image import imsave

    content = io.BytesIO()
    imsave(content, pixels, format="png", dpi=_DOTS_PER_INCH)
    return content.getvalue()


def line_style(index: int, num_lines: int, values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return the style of one of several lines: colour, dash and marker all differ as long as they can.

    Args:
        index: Its number among the lines.
        num_lines: How many there are.
        values: What it shows.

    Example:
        >>> line_style(0, 3, [0.5, 1.0])["color"] != line_style(1, 3, [0.5, 1.0])["color"]
        True
    """
    styles_apart = num_lines <= len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _STYLES[(index if styles_apart else index // len(COLOURS)) % len(_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        # At even distances; of fewer than two points matplotlib would then draw none, or fail.
        "markevery": 0.03 if np.isfinite(values).sum() > 1 else None,
        "linewidth": 1.8,
    }


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _drawable(depths: Sequence[int], values: Sequence[float], log_scale: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Leave out what no axis can show: values that are not finite, and on a logarithmic one those that are not > 0."""
    kept = np.isfinite(values) & ((np.asarray(values) > 0) | (not log_scale))
    return np.asarray(depths)[kept], np.asarray(values, dtype=float)[kept]


def _label(axes: Axes, depths: Iterable[Sequence[int]], title: str, ylabel: str) -> None:
    """Give axes that show something by depth their ticks, names and grid."""
    depth_axis(axes, [depth for curve in depths for depth in curve])
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)


def depth_curves(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    *,
    title: str = "Exact match by depth",
    ylabel: str = "exact match (%)",
    mean_depths: Mapping[str, float] | None = None,
) -> Figure:
    """Draw accuracy by depth, one curve a run.

    Args:
        curves: For each name depths and accuracies in [0, 1].
        title: Above the figure.
        ylabel: Beside it.
        mean_depths: Mean trained depth of some runs (loops), marked by a dotted line.

    Returns:
        The figure, 8 × 4.5 inches.

    Example:
        >>> figure = depth_curves({"stars": ([0, 4, 64], [0.0, 1.0, 1.0])}, mean_depths={"stars": 6.0})
    """
    figure, axes = canvas()
    for index, (name, (depths, accuracy)) in enumerate(curves.items()):
        mean = (mean_depths or {}).get(name)
        label = name if mean is None else f"{name} (mean trained depth {mean:.3g}, dotted)"
        axes.plot(depths, _percent(accuracy), label=label, **line_style(index, len(curves), accuracy))
        if mean is not None:
            axes.axvline(mean, color=COLOURS[index % len(COLOURS)], linestyle=":", linewidth=1, alpha=0.7)
    _label(axes, (depths for depths, _ in curves.values()), title, ylabel)
    axes.set_ylim(*_PERCENT_LIMITS)
    axes.legend(loc="best", framealpha=0.9)
    return figure


def accuracy_bands(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float], Sequence[float]]],
    *,
    confidence: float,
    title: str = "Graded answers by depth",
) -> Figure:
    """Draw accuracy by depth with its interval, one curve a set of problems.

    Args:
        curves: For each name depths, accuracies and the ends of their intervals, in [0, 1].
        confidence: Of the intervals, for the label.
        title: Above the figure.

    Returns:
        The figure, 8 × 4.5 inches.

    Example:
        >>> figure = accuracy_bands({"gsm8k": ([1, 4], [0.2, 0.5], [0.1, 0.4], [0.3, 0.6])}, confidence=0.95)
    """
    figure, axes = canvas()
    for index, (name, (depths, accuracy, low, high)) in enumerate(curves.items()):
        style = line_style(index, len(curves), accuracy)
        axes.plot(depths, _percent(accuracy), label=name, **style)
        label = f"bootstrap interval, {confidence:.0%}" if index == 0 else None
        axes.fill_between(
            depths, _percent(low), _percent(high), color=style["color"], alpha=0.2, linewidth=0, label=label
        )
    _label(axes, (depths for depths, *_ in curves.values()), title, "accuracy (%)")
    axes.set_ylim(*_PERCENT_LIMITS)
    axes.legend(loc="best", framealpha=0.9)
    return figure


def settling_by_depth(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]],
    *,
    title: str = "When answers become right, and whether they stay so",
) -> Figure:
    """Draw the distribution of the settling depth, and beside it the share of answers that have left again.

    Args:
        curves: For each name depths, the share of problems settled by then and the share escaped by then, in [0, 1]
            (see :class:`~looplm.metrics.DepthSettling`).
        title: Above the figure.

    Returns:
        The figure, 10 × 4.2 inches, two panels.

    Example:
        >>> figure = settling_by_depth({"stars": ([0, 2, 4], [0.0, 0.9, 1.0], [0.0, 0.0, 0.01])})
    """
    figure = blank((10, 4.2))
    left, right = figure.subplots(1, 2)
    for index, (name, (depths, settled, escaped)) in enumerate(curves.items()):
        style = {**line_style(index, len(curves), settled), "drawstyle": "steps-post"}  # nothing is seen in between
        left.plot(depths, _percent(settled), label=name, **style)
        right.plot(depths, _percent(escaped), label=name, **style)
    every = [depth for depths, *_ in curves.values() for depth in depths]
    most = 100 * max((value for *_, escaped in curves.values() for value in escaped), default=0.0)
    for axes, name, top in (
        (left, "has been right (%)", 103.0),
        (right, "right before, wrong since (%)", max(1.0, 1.1 * most)),
    ):
        _label(axes, [every], "", name)
        axes.tick_params(axis="x", labelrotation=45 if max(every) > 64 else 0)
        axes.set_ylim(-0.03 * top, top)
    left.legend(loc="lower right", framealpha=0.9)
    figure.suptitle(title)
    return figure


def quantity_by_depth(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    *,
    title: str,
    ylabel: str,
    log_scale: bool = False,
    threshold: float | None = None,
    threshold_label: str = "",
    from_zero: bool = False,
) -> Figure:
    """Draw a quantity by depth, one curve a name; for example the residual, the state's norm or ρ.

    Args:
        curves: For each name depths and values; values that are not finite are left out. A name may be empty.
        title: Above the figure.
        ylabel: Name and unit of the quantity.
        log_scale: Whether the quantity's axis is logarithmic.
        threshold: A value to mark with a line, for example ρ = 1.
        threshold_label: What it means, for the legend; empty: the value alone.
        from_zero: Whether the quantity's axis starts at 0.

    Returns:
        The figure, 8 × 4.5 inches.

    Example:
        >>> figure = quantity_by_depth({"stars": ([1, 64], [0.9, 0.7])}, title="ρ", ylabel="ρ", threshold=1.0)
    """
    figure, axes = canvas()
    num_points = 0
    for index, (name, (depths, values)) in enumerate(curves.items()):
        points = _drawable(depths, values, log_scale)
        axes.plot(*points, label=name, **line_style(index, len(curves), points[1]))
        num_points += len(points[0])
    if threshold is not None:
        axes.axhline(
            threshold, color="0.35", linewidth=1, linestyle=(0, (4, 3)), label=threshold_label or f"{threshold:g}"
        )
    _label(axes, (depths for depths, _ in curves.values()), title, ylabel)
    if log_scale and num_points:
        axes.set_yscale("log")
    if from_zero:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    if any(curves) or threshold is not None:
        axes.legend(loc="best", framealpha=0.9)
    return figure


def accuracy_and_stability(
    depths: Sequence[int],
    accuracy: Sequence[float],
    stability_depths: Sequence[int],
    stability: Sequence[float],
    *,
    stability_label: str,
    title: str = "Accuracy and stability by depth",
) -> Figure:
    """Draw accuracy (left axis) over a stability quantity (right axis, with 1 marked) by depth.

    Args:
        depths: Depths of the accuracy curve.
        accuracy: Accuracies in [0, 1].
        stability_depths: Depths of the quantity.
        stability: Its values; those that are not finite are left out.
        stability_label: Its name.
        title: Above the figure.

    Returns:
        The figure, 8 × 4.5 inches.

    Example:
        >>> figure = accuracy_and_stability([0, 4], [0.0, 1.0], [1, 4], [0.9, 0.8], stability_label="ρ")
    """
    figure, axes = canvas()
    left = axes.plot(depths, _percent(accuracy), label="exact match (left)", **line_style(0, 2, accuracy))
    right_axes = axes.twinx()
    places, values = _drawable(stability_depths, stability)
    right = right_axes.plot(places, values, label=f"{stability_label} (right)", **line_style(1, 2, values))
    one = right_axes.axhline(1.0, color=COLOURS[1], linewidth=1.2, linestyle=":", label=f"{stability_label} = 1")
    log_scale = min(values, default=0.0) > 0 and max(values) > 20
    if log_scale:
        right_axes.set_yscale("log")
    else:
        right_axes.set_ylim(0, max(1.2, 1.1 * max(values, default=1.0)))
    right_axes.set_ylabel(stability_label + (" (log scale)" if log_scale else ""), color=COLOURS[1])
    right_axes.tick_params(axis="y", colors=COLOURS[1])
    _label(axes, (depths, stability_depths), title, "exact match (%)")
    axes.set_ylim(*_PERCENT_LIMITS)
    axes.yaxis.label.set_color(COLOURS[0])
    axes.tick_params(axis="y", colors=COLOURS[0])
    figure.legend(handles=[*left, *right, one], loc="outside lower center", ncols=3, frameon=False)
    return figure
