"""Arrays in, figures out. The only file that imports matplotlib; knows no model, no run and no logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Figure  # for the types of other files

__all__ = [
    "COLOURS",
    "accuracy_and_stability",
    "accuracy_bands",
    "blank",
    "canvas",
    "depth_axis",
    "depth_curves",
    "eigenvalue_plane",
    "latent_paths",
    "line_style",
    "quantity_by_depth",
    "settling_by_depth",
]

# Okabe and Ito's palette, told apart by the colour-blind; line style and marker tell the curves apart in grey too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


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


def line_style(index: int, num_lines: int) -> dict[str, Any]:
    """Return the style of one of several lines: colour, dash and marker all differ as long as they can.

    Example:
        >>> line_style(0, 3)["color"] != line_style(1, 3)["color"]
        True
    """
    styles_apart = num_lines <= len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _STYLES[(index if styles_apart else index // len(COLOURS)) % len(_STYLES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "markevery": 0.03,
        "linewidth": 1.8,
    }


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
        axes.plot(depths, [100 * value for value in accuracy], label=label, **line_style(index, len(curves)))
        if mean is not None:
            axes.axvline(mean, color=COLOURS[index % len(COLOURS)], linestyle=":", linewidth=1, alpha=0.7)
    depth_axis(axes, [depth for depths, _ in curves.values() for depth in depths])
    axes.set_ylim(-3, 103)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
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
        style = line_style(index, len(curves))
        axes.plot(depths, [100 * value for value in accuracy], label=name, **style)
        ends = [[100 * value for value in end] for end in (low, high)]
        label = f"bootstrap interval, {confidence:.0%}" if index == 0 else None
        axes.fill_between(depths, *ends, color=style["color"], alpha=0.2, linewidth=0, label=label)
    depth_axis(axes, [depth for depths, *_ in curves.values() for depth in depths])
    axes.set_ylim(-3, 103)
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
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
        style = {**line_style(index, len(curves)), "drawstyle": "steps-post"}  # nothing is seen between two depths
        left.plot(depths, [100 * value for value in settled], label=name, **style)
        right.plot(depths, [100 * value for value in escaped], label=name, **style)
    every = [depth for depths, *_ in curves.values() for depth in depths]
    most = 100 * max((value for *_, escaped in curves.values() for value in escaped), default=0.0)
    for axes, name, top in (
        (left, "has been right (%)", 103.0),
        (right, "right before, wrong since (%)", max(1.0, 1.1 * most)),
    ):
        depth_axis(axes, every)
        axes.tick_params(axis="x", labelrotation=45 if max(every) > 64 else 0)
        axes.set_ylim(-0.03 * top, top)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
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
        kept = [(d, v) for d, v in zip(depths, values, strict=True) if np.isfinite(v) and (v > 0 or not log_scale)]
        axes.plot(*zip(*kept, strict=True) if kept else ((), ()), label=name, **line_style(index, len(curves)))
        num_points += len(kept)
    if threshold is not None:
        axes.axhline(
            threshold, color="0.35", linewidth=1, linestyle=(0, (4, 3)), label=threshold_label or f"{threshold:g}"
        )
    depth_axis(axes, [depth for depths, _ in curves.values() for depth in depths])
    if log_scale and num_points:
        axes.set_yscale("log")
    if from_zero:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if any(curves) or threshold is not None:
        axes.legend(loc="best", framealpha=0.9)
    return figure


def eigenvalue_plane(eigenvalues: Mapping[str, Sequence[complex]], *, title: str = "Eigenvalues of the step") -> Figure:
    """Draw eigenvalues in the complex plane, with the unit circle.

    Args:
        eigenvalues: For each name (a depth, say) complex eigenvalues; those that are not finite are left out.
        title: Above the figure.

    Returns:
        The figure, 7 × 5 inches.

    Example:
        >>> figure = eigenvalue_plane({"stars": [0.5 + 0.2j, 0.5 - 0.2j]})
    """
    figure, axes = canvas((7, 5))
    angle = np.linspace(0, 2 * np.pi, 361)
    axes.fill(np.cos(angle), np.sin(angle), color="0.95", zorder=0)
    axes.plot(np.cos(angle), np.sin(angle), color="0.35", linewidth=1, label="unit circle")
    for index, (name, values) in enumerate(eigenvalues.items()):
        points = np.asarray(values, dtype=complex)
        points = points[np.isfinite(points)]
        style = {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.scatter(points.real, points.imag, s=26, alpha=0.8, linewidths=0, label=name, zorder=3, **style)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=1)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=1)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def latent_paths(
    coordinates: np.ndarray,
    depths: Sequence[int],
    explained: Sequence[float],
    *,
    residuals: Sequence[float] | None = None,
    tolerance: float = 1e-3,
    title: str = "Latent trajectories",
) -> Figure:
    """Draw trajectories in their principal components, coloured by depth, with their ends marked.

    Args:
        coordinates: ``(K, B, C)``, C = 2 for a plane or 3 for space.
        depths: K depths.
        explained: Share of the variance of each component, ``(C,)``.
        residuals: Residual of each last state, ``(B,)``: below ``tolerance`` it is marked as a fixed point (star),
            else as a mere last state (cross); None: all are last states.
        tolerance: Largest residual of a fixed point.
        title: Above the figure.

    Returns:
        The figure, 7.5 × 5.5 inches.

    Example:
        >>> figure = latent_paths(np.zeros((3, 2, 3)), depths=[0, 1, 4], explained=[0.8, 0.1, 0.05])
    """
    from matplotlib.colors import Normalize

    num_paths, dims = coordinates.shape[1:]
    figure, axes = canvas((7.5, 5.5), projection="3d" if dims == 3 else None)
    shade = np.log2(np.asarray(depths, dtype=float) + 1)
    scale = Normalize(shade.min(), max(shade.max(), shade.min() + 1e-9))
    if dims == 3:
        axes.computed_zorder = False  # else the last points cover their marks
        axes.set_box_aspect(None, zoom=0.88)
        axes.locator_params(nbins=5)
    depth_only = {"depthshade": False} if dims == 3 else {}
    for index in range(num_paths):
        path = coordinates[:, index].T
        axes.plot(*path, color="0.6", linewidth=0.9, zorder=1)
        points = axes.scatter(*path, c=shade, norm=scale, cmap="viridis", s=22, zorder=2, **depth_only)
    settled = np.zeros(num_paths, bool) if residuals is None else np.asarray(residuals) < tolerance
    for kind, marker, size, name in (
        (settled, "*", 130, f"fixed point (residual < {tolerance:g})"),
        (~settled, "X", 60, "last state" + ("" if residuals is None else f" (residual ≥ {tolerance:g})")),
    ):
        if kind.any():
            style = {"marker": marker, "s": size, "color": "#D55E00", "edgecolors": "black", "linewidths": 0.6}
            axes.scatter(*coordinates[-1, kind].T, zorder=3, label=name, **style, **depth_only)
    apart = {"labelpad": 10} if dims == 3 else {}
    for axis, share, number in zip(("x", "y", "z"), explained, (1, 2, 3), strict=False):
        getattr(axes, f"set_{axis}label")(f"component {number} ({100 * share:.0f} % of variance)", **apart)
    # Depths closer than a twelfth of the bar would print over one another.
    ticks = [len(depths) - 1]
    for tick in reversed(range(len(depths) - 1)):
        if shade[ticks[-1]] - shade[tick] >= (shade[-1] - shade[0]) / 12:
            ticks.append(tick)
    bar = figure.colorbar(
        points, ax=axes, shrink=0.8, pad=0.14 if dims == 3 else 0.02, label="depth (loops, log scale)"
    )
    bar.set_ticks([shade[tick] for tick in ticks], labels=[f"{depths[tick]:,}" for tick in ticks])
    bar.ax.minorticks_off()
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
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
    left = axes.plot(depths, [100 * value for value in accuracy], label="exact match (left)", **line_style(0, 2))
    right_axes = axes.twinx()
    kept = [(d, v) for d, v in zip(stability_depths, stability, strict=True) if np.isfinite(v)]
    values = [value for _, value in kept]
    label = f"{stability_label} (right)"
    right = right_axes.plot(*zip(*kept, strict=True) if kept else ((), ()), label=label, **line_style(1, 2))
    one = right_axes.axhline(1.0, color=COLOURS[1], linewidth=1.2, linestyle=":", label=f"{stability_label} = 1")
    if values and min(values) > 0 and max(values) > 20:
        right_axes.set_yscale("log")
        unit = " (log scale)"
    else:
        unit = ""
        right_axes.set_ylim(0, max(1.2, 1.1 * max(values, default=1.0)))
    right_axes.set_ylabel(stability_label + unit, color=COLOURS[1])
    right_axes.tick_params(axis="y", colors=COLOURS[1])
    depth_axis(axes, [*depths, *stability_depths])
    axes.set_ylim(-3, 103)
    axes.set_ylabel("exact match (%)", color=COLOURS[0])
    axes.tick_params(axis="y", colors=COLOURS[0])
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(handles=[*left, *right, one], loc="outside lower center", ncols=3, frameon=False)
    return figure
