"""Figures hold the numbers they were given."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from looplm.figures import (
    accuracy_and_stability,
    depth_curves,
    quantity_by_depth,
    settling_by_depth,
)
from looplm.group_figures import bands_by_depth
from looplm.state_figures import eigenvalue_plane, latent_paths


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def test_lines_are_the_curves_in_percent() -> None:
    axes = depth_curves({"one": ([0, 4, 100], [0.0, 0.5, 1.0]), "two": ([2], [0.25])}).axes[0]
    assert [line.get_xydata().tolist() for line in axes.get_lines()] == [[[0, 0], [4, 50], [100, 100]], [[2, 25]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]


def test_every_point_lies_within_the_axes() -> None:
    axes = depth_curves({"run": ([0, 1, 1024], [0.0, 1.0, 0.5])}).axes[0]
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    assert left < 0 <= 1024 < right
    assert bottom < 0 <= 100 < top


def test_mean_trained_depth_is_marked_and_named() -> None:
    axes = depth_curves({"a": ([1, 8], [0.5, 1.0]), "b": ([1, 8], [0.5, 1.0])}, mean_depths={"b": 5.91}).axes[0]
    first, second = (text.get_text() for text in axes.get_legend().get_texts())
    assert first == "a"
    assert "mean trained depth 5.91" in second
    assert [5.91, 5.91] in [list(line.get_xdata()) for line in axes.get_lines()]


@pytest.mark.parametrize("number", [3, 7, 15])
def test_curves_can_be_told_apart(number: int) -> None:
    axes = depth_curves({f"run {i}": ([1, 2], [0.1, 0.2]) for i in range(number)}).axes[0]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}
    assert len(looks) == number


def test_a_single_point_is_seen() -> None:
    assert _png(depth_curves({"run": ([4], [0.5])})) != _png(depth_curves({"run": ([4], [float("nan")])}))


def test_axes_and_title_are_labelled_as_asked() -> None:
    axes = depth_curves({"a": ([1], [0.5])}, title="Title", ylabel="token accuracy (%)").axes[0]
    assert (axes.get_title(), axes.get_ylabel()) == ("Title", "token accuracy (%)")
    assert "depth" in axes.get_xlabel()


@pytest.mark.parametrize("depths", [[0], [0, 1], [3], [0, 100_000]])
def test_any_range_of_depths_can_be_drawn(depths: list[int]) -> None:
    assert _png(depth_curves({"run": (depths, [0.5] * len(depths))})).startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_undefined_accuracy_leaves_a_gap_not_an_error(value: float) -> None:
    curve = ([0, 1], [float("nan"), value])
    assert _png(depth_curves({"run": curve, "other": ([0, 1], [0.0, 1.0])})).startswith(b"\x89PNG")
    assert _png(bands_by_depth({"run": [curve]}, title="", ylabel="")).startswith(b"\x89PNG")


def _texts(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def _overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Return pairs of texts outside of the axes (labels, title, legend, tick labels of one axis) that overlap."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            texts = [tick for tick in axis.get_ticklabels() if tick.get_text() and tick.get_visible()]
            texts = [axis.label, axes.title, *texts] if axis.label.get_text() else texts
            boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
            found += [
                (a, b)
                for index, (a, first) in enumerate(boxes)
                for b, second in boxes[index + 1 :]
                if first.overlaps(second)
            ]
    return found


def test_a_quantity_is_drawn_as_it_is_without_what_is_not_finite() -> None:
    figure = quantity_by_depth(
        {"a": ([1, 2, 4], [0.5, float("nan"), float("inf")]), "b": ([1, 2], [0.0, 0.25])},
        title="Residual",
        ylabel="residual",
        log_scale=True,
    )
    lines = [line.get_xydata().tolist() for line in figure.axes[0].get_lines()]
    assert lines == [[[1, 0.5]], [[2, 0.25]]]  # zero has no place on a logarithmic axis
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.parametrize("values", [[float("nan")] * 2, [0.0, 0.0]])
def test_a_quantity_without_a_value_can_be_drawn_too(values: list[float]) -> None:
    figure = quantity_by_depth({"": ([1, 2], values)}, title="t", ylabel="y", log_scale=True)
    assert _png(figure).startswith(b"\x89PNG")


def test_thresholds_are_marked_and_named() -> None:
    figure = quantity_by_depth(
        {"ρ": ([1, 2], [0.5, 0.6])}, title="t", ylabel="y", threshold=1.0, threshold_label="one", from_zero=True
    )
    assert _texts(figure) == ["ρ", "one"]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom == 0
    assert top > 1


def test_eigenvalues_stand_at_their_places_with_the_unit_circle() -> None:
    figure = eigenvalue_plane({"sequence 0": [0.5 + 0.5j, complex("nan")], "sequence 1": [2.0]})
    axes = figure.axes[0]
    points = [collection.get_offsets().tolist() for collection in axes.collections]
    assert [[0.5, 0.5]] in points
    assert [[2.0, 0.0]] in points
    assert _texts(figure) == ["unit circle", "sequence 0", "sequence 1"]
    circle = axes.get_lines()[0].get_xydata()
    np.testing.assert_allclose(np.linalg.norm(circle, axis=1), 1.0)
    assert axes.get_aspect() == 1.0


@pytest.mark.parametrize("dims", [2, 3])
def test_ends_of_paths_are_named_for_what_they_are(dims: int) -> None:
    coordinates = np.random.default_rng(0).standard_normal((3, 4, dims))
    options = {"coordinates": coordinates, "depths": [1, 4, 16], "explained": [0.5, 0.3, 0.1][:dims]}
    assert _texts(latent_paths(**options, residuals=[1e-5, 1e-5, 0.1, float("nan")])) == [
        "fixed point (residual < 0.001)",
        "last state (residual ≥ 0.001)",
    ]
    assert _texts(latent_paths(**options, residuals=[1e-5] * 4)) == ["fixed point (residual < 0.001)"]
    figure = latent_paths(**options)
    assert _texts(figure) == ["last state"]
    assert figure.axes[0].get_xlabel() == "component 1 (50 % of variance)"
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["16", "4", "1"]


def test_accuracy_and_stability_have_an_axis_each() -> None:
    figure = accuracy_and_stability([1, 4], [0.25, 1.0], [1, 2], [0.5, 2.0], stability_label="ρ")
    left, right = figure.axes
    assert left.get_lines()[0].get_xydata().tolist() == [[1, 25], [4, 100]]
    assert right.get_lines()[0].get_xydata().tolist() == [[1, 0.5], [2, 2.0]]
    assert list(right.get_lines()[1].get_ydata()) == [1.0, 1.0]
    assert _texts(figure) == ["exact match (left)", "ρ (right)", "ρ = 1"]
    assert _png(accuracy_and_stability([1], [0.5], [1], [float("nan")], stability_label="ρ")).startswith(b"\x89PNG")


def test_labels_do_not_overlap() -> None:
    depths = [0, *(2**k for k in range(11))]
    values = [0.5] * len(depths)
    paths = np.random.default_rng(0).standard_normal((len(depths), 4, 2))
    for figure in (
        quantity_by_depth({"a": (depths, values)}, title="Residual by depth", ylabel="residual", log_scale=True),
        accuracy_and_stability(depths, values, depths, values, stability_label="spectral radius ρ(J)"),
        latent_paths(paths, depths, [0.5, 0.5]),
        eigenvalue_plane({"sequence 0": [0.5, 3.0]}),
    ):
        assert _overlaps(figure) == []


def test_settling_shows_both_distributions_and_keeps_small_escapes_visible() -> None:
    depths, settled, escaped = [0, 1, 2, 4096], [0.0, 0.9, 1.0, 1.0], [0.0, 0.0, 0.001, 0.002]
    figure = settling_by_depth({"run": (depths, settled, escaped)})
    left, right = figure.axes
    assert left.lines[0].get_ydata().tolist() == pytest.approx([0, 90, 100, 100])
    assert right.lines[0].get_ydata().tolist() == pytest.approx([0, 0, 0.1, 0.2])
    assert right.get_ylim()[1] == pytest.approx(1.0)  # a few problems in a thousand are still seen
    assert left.get_ylim()[1] > 100
