"""The latent state itself: eigenvalues of the step, paths in principal components. Arrays in, figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from looplm.figures import COLOURS, MARKERS, canvas

if TYPE_CHECKING:
    from looplm.figures import Figure

__all__ = ["eigenvalue_plane", "latent_paths"]


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
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
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
    num_paths, dims = coordinates.shape[1:]
    figure, axes = canvas((7.5, 5.5), projection="3d" if dims == 3 else None)
    shade = np.log2(np.asarray(depths, dtype=float) + 1)
    scale = {"vmin": shade.min(), "vmax": max(shade.max(), shade.min() + 1e-9), "cmap": "viridis"}
    if dims == 3:
        axes.computed_zorder = False  # else the last points cover their marks
        axes.set_box_aspect(None, zoom=0.88)
        axes.locator_params(nbins=5)
    depth_only = {"depthshade": False} if dims == 3 else {}
    for index in range(num_paths):
        path = coordinates[:, index].T
        axes.plot(*path, color="0.6", linewidth=0.9, zorder=1)
        points = axes.scatter(*path, c=shade, s=22, zorder=2, **scale, **depth_only)
    settled = np.zeros(num_paths, bool) if residuals is None else np.asarray(residuals) < tolerance
    for kind, marker, size, name in (
        (settled, "*", 130, f"fixed point (residual < {tolerance:g})"),
        (~settled, "X", 60, "last state" + ("" if residuals is None else f" (residual ≥ {tolerance:g})")),
    ):
        if kind.any():
            style = {"marker": marker, "s": size, "color": COLOURS[1], "edgecolors": "black", "linewidths": 0.6}
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
