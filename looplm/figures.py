"""Arrays in, figures out. The only file that imports matplotlib; knows no model, no run and no logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["depth_curves"]

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
        mean_depths: Mean trained depth of some runs (loops), marked on their curves' axis by a tick at the top.

    Returns:
        The figure, 8 × 4.5 inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, (depths, accuracy)) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        style = (
            _STYLES[index // len(_COLOURS) % len(_STYLES)]
            if len(curves) > len(_COLOURS)
            else (_STYLES[index % len(_STYLES)])
        )
        mean = (mean_depths or {}).get(name)
        label = name if mean is None else f"{name} (mean trained depth {mean:.3g})"
        axes.plot(
            depths,
            [100 * value for value in accuracy],
            color=colour,
            linestyle=style,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.8,
            label=label,
        )
        if mean is not None:
            axes.axvline(mean, color=colour, linestyle=":", linewidth=1, alpha=0.7)
    _depth_axis(axes, [depth for depths, _ in curves.values() for depth in depths])
    axes.set_ylim(-3, 103)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9)
    return figure
