"""Medians and intervals of made-up times."""

from __future__ import annotations

import numpy as np
import pytest

from .timing import Measurement, Row, paired_seconds, ratio_of


def test_a_ratio_survives_a_load_that_comes_and_goes() -> None:
    load = np.random.default_rng(0).uniform(1, 20, 25)
    measured = ratio_of(load * 1.3, load)
    assert (measured.value, measured.low, measured.high) == pytest.approx((1.3, 1.3, 1.3))


def test_the_interval_narrows_with_the_rounds_and_holds_the_truth() -> None:
    generator = np.random.default_rng(0)
    widths = []
    for num_rounds in (5, 400):
        measured = ratio_of(1.5 * generator.lognormal(0, 0.2, num_rounds), np.ones(num_rounds))
        assert measured.low <= measured.value <= measured.high
        widths.append(measured.high - measured.low)
    assert measured.low < 1.5 < measured.high
    assert widths[1] < widths[0] / 3


def test_both_sides_take_turns_and_begin_equally_often() -> None:
    calls: list[str] = []
    first, second = paired_seconds(lambda: calls.append("a"), lambda: calls.append("b"), 4)
    assert len(first) == len(second) == 4
    assert "".join(calls[2:]) == "baabbaab"


@pytest.mark.parametrize(("value", "is_met"), [(1.0, True), (1.2, False)])
def test_a_target_is_met_on_its_own_side(value: float, is_met: bool) -> None:
    assert Row("a", "b", Measurement.exact(value), 1.1, "at most").is_met == is_met
    assert Row("a", "b", Measurement.exact(value), 1.1, "at least").is_met != is_met
