"""Figures hold the numbers they were given."""

from __future__ import annotations

import io

import pytest

from looplm.figures import depth_curves


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


def test_axes_and_title_are_labelled_as_asked() -> None:
    axes = depth_curves({"a": ([1], [0.5])}, title="Title", ylabel="token accuracy (%)").axes[0]
    assert (axes.get_title(), axes.get_ylabel()) == ("Title", "token accuracy (%)")
    assert "depth" in axes.get_xlabel()


@pytest.mark.parametrize("depths", [[0], [0, 1], [3], [0, 100_000]])
def test_any_range_of_depths_can_be_drawn(depths: list[int]) -> None:
    content = io.BytesIO()
    depth_curves({"run": (depths, [0.5] * len(depths))}).savefig(content, format="png")
    assert content.getvalue().startswith(b"\x89PNG")


def test_undefined_accuracy_leaves_a_gap_not_an_error() -> None:
    content = io.BytesIO()
    depth_curves({"run": ([0, 1], [float("nan"), 0.5])}).savefig(content, format="png")
    assert content.getvalue().startswith(b"\x89PNG")
