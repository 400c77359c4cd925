"""Arrays in, figures out. The only file that imports matplotlib; knows no model, no run and no logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_and_stability", "depth_curves", "eigenvalue_plane", "latent_paths", "quantity_by_depth"]

# Okabe and Ito's palette, told apart by the colour-blind; line style and marker tell the curves apart in grey too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _depth_axis(axes: Axes, depths: Sequence[int]) -> None:
    """Show depth 0, 1, 2, 4, … at even distances."""
    axes.set_xscale("symlog", base=2, linthresh=1, linscale=1)
    last = max(depths)
    ticks = [0, *(2**k for k in range(last.bit_length()))]
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(-0.15, last * 1.15)
    axes.set_xlabel("depth (loops, log scale)")


def _canvas(size: tuple[float, float] = (8, 4.5), projection: str | None = None) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot(projection=projection)


def _line(index: int, num_lines: int) -> dict[str, Any]:
    """Return the style of one of several lines: colour, dash and marker all differ as long as they can."""
    styles_apart = num_lines <= len(_COLOURS)
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _STYLES[(index if styles_apart else index // len(_COLOURS)) % len(_STYLES)],
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
    """
    figure, axes = _canvas()
    for index, (name, (depths, accuracy)) in enumerate(curves.items()):
        mean = (mean_depths or {}).get(name)
        label = name if mean is None else f"{name} (mean trained depth {mean:.3g}, dotted)"
        axes.plot(depths, [100 * value for value in accuracy], label=label, **_line(index, len(curves)))
        if mean is not None:
            axes.axvline(mean, color=_COLOURS[index % len(_COLOURS)], linestyle=":", linewidth=1, alpha=0.7)
    _depth_axis(axes, [depth for depths, _ in curves.values() for depth in depths])
    axes.set_ylim(-3, 103)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9)
    return figure


def quantity_by_depth(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    *,
    title: str,
    ylabel: str,
    log_scale: bool = False,
    threshold: float | None = None,
) -> Figure:
    """Draw a quantity by depth, one curve a name; for example the residual, the state's norm or ρ.

    Args:
        curves: For each name depths and values; values that are not finite are left out.
        title: Above the figure.
        ylabel: Name and unit of the quantity.
        log_scale: Whether the quantity's axis is logarithmic.
        threshold: A value to mark with a line, for example ρ = 1.

    Returns:
        The figure, 8 × 4.5 inches.
    """
    figure, axes = _canvas()
    for index, (name, (depths, values)) in enumerate(curves.items()):
        kept = [(d, v) for d, v in zip(depths, values, strict=True) if np.isfinite(v) and (v > 0 or not log_scale)]
        axes.plot(*zip(*kept, strict=True) if kept else ((), ()), label=name, **_line(index, len(curves)))
    if threshold is not None:
        axes.axhline(threshold, color="0.35", linewidth=1, linestyle=(0, (4, 3)), label=f"{threshold:g}")
    _depth_axis(axes, [depth for depths, _ in curves.values() for depth in depths])
    if log_scale:
        axes.set_yscale("log")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9)
    return figure


def eigenvalue_plane(eigenvalues: Mapping[str, Sequence[complex]], *, title: str = "Eigenvalues of the step") -> Figure:
    """Draw eigenvalues in the complex plane, with the unit circle.

    Args:
        eigenvalues: For each name (a depth, say) complex eigenvalues.
        title: Above the figure.

    Returns:
        The figure, 5.5 × 5 inches.
    """
    figure, axes = _canvas((5.5, 5))
    angle = np.linspace(0, 2 * np.pi, 361)
    axes.plot(np.cos(angle), np.sin(angle), color="0.35", linewidth=1, label="unit circle")
    for index, (name, values) in enumerate(eigenvalues.items()):
        points = np.asarray(values, dtype=complex)
        points = points[np.isfinite(points)]
        style = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.scatter(points.real, points.imag, s=22, alpha=0.75, linewidths=0, label=name, **style)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def latent_paths(
    coordinates: np.ndarray, depths: Sequence[int], explained: Sequence[float], *, title: str = "Latent trajectories"
) -> Figure:
    """Draw trajectories in their principal components, coloured by depth, the last state marked as the fixed point.

    Args:
        coordinates: ``(K, B, C)``, C = 2 for a plane or 3 for space.
        depths: K depths.
        explained: Share of the variance of each component, ``(C,)``.
        title: Above the figure.

    Returns:
        The figure, 7 × 5.5 inches.
    """
    from matplotlib.colors import Normalize

    dims = coordinates.shape[-1]
    figure, axes = _canvas((7, 5.5), projection="3d" if dims == 3 else None)
    shade = np.log2(np.asarray(depths, dtype=float) + 1)
    scale = Normalize(shade.min(), max(shade.max(), shade.min() + 1e-9))
    for index in range(coordinates.shape[1]):
        path = coordinates[:, index].T
        axes.plot(*path, color="0.75", linewidth=0.8, zorder=1)
        points = axes.scatter(*path, c=shade, norm=scale, cmap="viridis", s=18, zorder=2)
        label = "last state" if index == 0 else None
        end = [[value] for value in path[:, -1]]
        axes.scatter(
            *end, marker="*", s=110, color="#D55E00", edgecolors="black", linewidths=0.6, zorder=3, label=label
        )
    for axis, share, number in zip(("x", "y", "z"), explained, (1, 2, 3), strict=False):
        getattr(axes, f"set_{axis}label")(f"component {number} ({100 * share:.0f} % of variance)")
    ticks = sorted({int(tick) for tick in np.linspace(0, len(depths) - 1, min(len(depths), 6))})
    bar = figure.colorbar(points, ax=axes, shrink=0.8, pad=0.1 if dims == 3 else 0.02, label="depth (loops)")
    bar.set_ticks([shade[tick] for tick in ticks], labels=[f"{depths[tick]:,}" for tick in ticks])
    axes.set_title(title)
    axes.legend(loc="upper left", framealpha=0.9)
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
        stability: Its values.
        stability_label: Its name.
        title: Above the figure.

    Returns:
        The figure, 8 × 4.5 inches.
    """
    figure, axes = _canvas()
    left = axes.plot(depths, [100 * value for value in accuracy], label="exact match", **_line(0, 2))
    right_axes = axes.twinx()
    right = right_axes.plot(stability_depths, stability, label=stability_label, **_line(1, 2))
    right_axes.axhline(1.0, color=_COLOURS[1], linewidth=1, linestyle=":")
    right_axes.set_ylim(0, max(1.2, 1.1 * max(stability)))
    right_axes.set_ylabel(f"{stability_label} (1 marked)")
    _depth_axis(axes, [*depths, *stability_depths])
    axes.set_ylim(-3, 103)
    axes.set_ylabel("exact match (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(handles=[*left, *right], loc="best", framealpha=0.9)
    return figure
