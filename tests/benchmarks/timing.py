"""Two things timed in turns, and the ratio of their times with an interval. Knows nothing of what it times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np

__all__ = ["Measurement", "Row", "paired_seconds", "ratio_of", "timed"]

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """A value and its 95 % interval; both ends equal the value where nothing was repeated."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Measurement:
        return cls(value, value, value)


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, against what, and whether the target is met."""

    what: str
    against: str
    measured: Measurement
    target: float
    bound: Literal["at most", "at least"]
    unit: str = "x"

    @property
    def is_met(self) -> bool:
        value = self.measured.value
        return value <= self.target if self.bound == "at most" else value >= self.target

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_met": self.is_met}


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """Return how long a call takes, in seconds, and what it returns."""
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def paired_seconds(first: Callable[[], Any], second: Callable[[], Any], num_rounds: int) -> tuple[list[float], ...]:
    """Time two calls in turns, so that another load on the machine meets both; who begins changes every round."""
    first(), second()  # what is done once, such as taking memory, is no part of it
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(num_rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            times[index].append(timed((first, second)[index])[0])
    return times


def ratio_of(above: Sequence[float], below: Sequence[float], num_resamples: int = 2000) -> Measurement:
    """Return the median over rounds of ``above / below``, with its bootstrap interval (percentiles 2.5 and 97.5).

    Example:
        >>> ratio_of([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
        Measurement(value=2.0, low=2.0, high=2.0)
    """
    ratios = np.asarray(above) / np.asarray(below)
    rows = np.random.default_rng(0).integers(len(ratios), size=(num_resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[rows], axis=1), [2.5, 97.5])
    return Measurement(float(np.median(ratios)), float(low), float(high))
