"""Accuracy and dynamics by depth of finished runs, and how well they hold their accuracy. Knows numbers, no files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = [
    "DYNAMICS",
    "Curve",
    "Group",
    "accuracy_at",
    "area_under_curve",
    "group_runs",
]

DYNAMICS = ("residual", "state_norm", "mean_gain", "spectral_norm", "spectral_radius", "lyapunov_exponent")
"""Columns of ``{stage}_dynamics.csv`` beside ``depth``; any of them may be missing."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy by depth of one run, as read from its directory.

    Example:
        >>> measured = {"depths": [0, 4, 32], "exact_match": [0.0, 1.0, 0.5], "token_accuracy": [0.0, 1.0, 0.75]}
        >>> curve = Curve(name="stars", mean_depth=4.0, **measured)
        >>> curve.at_multiple(8), curve.robustness
        (0.5, 0.71875)
    """

    name: str
    depths: list[int]
    exact_match: list[float]
    token_accuracy: list[float]
    mean_depth: float | None
    settled: list[float] | None = None
    """Share of the problems whose answer has been right at each depth or before; None if it was not written."""
    escaped: list[float] | None = None
    """Share of the problems whose answer has been right and then wrong, at each depth or before."""
    dynamics: Mapping[str, list[float]] = field(default_factory=dict)
    """``depth`` and some of ``DYNAMICS``, one value a depth, NaN where there is none; empty if they were not logged."""

    @property
    def robustness(self) -> float | None:
        """Area under the exact match up to 8 × mean trained depth, in [0, 1]; see :func:`area_under_curve`."""
        return (
            None if not self.mean_depth else area_under_curve(self.depths, self.exact_match, last=8 * self.mean_depth)
        )

    @property
    def escapes(self) -> float | None:
        """Share of the problems whose answer has been right at some depth and wrong at a later one."""
        return self.escaped[-1] if self.escaped else None

    def at_multiple(self, multiple: float) -> float | None:
        """Return the exact match at a multiple of the mean trained depth; see :func:`accuracy_at`."""
        return None if not self.mean_depth else accuracy_at(self.depths, self.exact_match, multiple * self.mean_depth)

    def deepest(self, quantity: str) -> float | None:
        """Return a quantity of the dynamics at the deepest depth where it is finite."""
        finite = [value for value in self.dynamics.get(quantity, ()) if math.isfinite(value)]
        return finite[-1] if finite else None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but the seed.

    Example:
        >>> shared = {"depths": [0, 4], "token_accuracy": [0.0, 1.0], "mean_depth": 4.0}
        >>> runs = [Curve(name=f"a_seed{i}", exact_match=[0.0, right], **shared) for i, right in enumerate((0.5, 1.0))]
        >>> Group(name="a", runs=runs).peak
        (0.75, 0.5, 1.0)
    """

    name: str
    runs: list[Curve]

    def spread(self, values: Sequence[float | None]) -> tuple[float, float, float] | None:
        """Return mean, least and greatest of the values of the runs that have one."""
        known = [value for value in values if value is not None]
        return (sum(known) / len(known), min(known), max(known)) if known else None

    @property
    def robustness(self) -> tuple[float, float, float] | None:
        """Mean, least and greatest :attr:`Curve.robustness`."""
        return self.spread([run.robustness for run in self.runs])

    def at_multiple(self, multiple: float) -> tuple[float, float, float] | None:
        """Mean, least and greatest :meth:`Curve.at_multiple`."""
        return self.spread([run.at_multiple(multiple) for run in self.runs])

    def deepest(self, quantity: str) -> tuple[float, float, float] | None:
        """Mean, least and greatest :meth:`Curve.deepest`."""
        return self.spread([run.deepest(quantity) for run in self.runs])

    @property
    def escapes(self) -> tuple[float, float, float] | None:
        """Mean, least and greatest :attr:`Curve.escapes`."""
        return self.spread([run.escapes for run in self.runs])

    @property
    def peak(self) -> tuple[float, float, float] | None:
        """Mean, least and greatest peak."""
        return self.spread([max(run.exact_match) for run in self.runs])

    @property
    def mean_depth(self) -> float | None:
        """Mean trained depth (loops)."""
        found = self.spread([run.mean_depth for run in self.runs])
        return None if found is None else found[0]


def accuracy_at(depths: Sequence[int], accuracy: Sequence[float], depth: float) -> float | None:
    """Return the accuracy at a depth, linear between evaluated depths; None outside them.

    Args:
        depths: K increasing depths.
        accuracy: The accuracy at each.
        depth: Where (loops; need not be whole).

    Example:
        >>> accuracy_at([0, 4, 8], [0.0, 1.0, 0.5], 6.0)
        0.75
    """
    if not depths[0] <= depth <= depths[-1]:
        return None
    return float(np.interp(depth, depths, accuracy))


def area_under_curve(depths: Sequence[int], accuracy: Sequence[float], *, last: float) -> float | None:
    """Return ``∫ a(d) dd / (last − d₁)`` from the first evaluated depth d₁ to ``last``, a linear between depths.

    That is the mean accuracy over depth (not its logarithm): the trapezoid rule on the evaluated depths. 1 means every
    problem right at every depth from d₁ on.

    Args:
        depths: K increasing depths d₁ < … < d_K.
        accuracy: The accuracy at each, in [0, 1].
        last: Where the area ends (loops; need not be whole).

    Returns:
        The area in [0, 1]; None if the curve does not reach ``last``, since a shorter area would not compare.

    Example:
        >>> area_under_curve([0, 4, 8], [0.0, 1.0, 0.5], last=6)
        0.625
    """
    end = accuracy_at(depths, accuracy, last)
    if end is None or last <= depths[0]:
        return None
    inner = [(depth, value) for depth, value in zip(depths, accuracy, strict=True) if depth < last]
    x, y = (np.array(column, dtype=float) for column in zip(*inner, (last, end), strict=True))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / (last - depths[0]))


def group_runs(curves: Sequence[Curve]) -> list[Group]:
    """Group runs called ``NAME_seedN`` under NAME and sort the groups, the most depth-robust first.

    Sorted by :attr:`Curve.robustness`, then by the exact match at 16 × mean depth, both as means over the runs; groups
    without them stand last, by their peak.

    Example:
        >>> shared = {"depths": [0, 4], "token_accuracy": [0.0, 1.0], "mean_depth": 0.5}
        >>> right = {"a_seed0": 0.5, "a_seed1": 0.7, "b_seed0": 0.9}
        >>> curves = [Curve(name=name, exact_match=[0.0, value], **shared) for name, value in right.items()]
        >>> [(group.name, len(group.runs)) for group in group_runs(curves)]
        [('b', 1), ('a', 2)]
    """
    named: dict[str, list[Curve]] = {}
    for curve in curves:
        named.setdefault(re.sub(r"_seed\d+$", "", curve.name), []).append(curve)
    groups = [Group(name=name, runs=runs) for name, runs in named.items()]

    def rank(group: Group) -> tuple[float, ...]:
        values = (group.robustness, group.at_multiple(16), group.peak)
        return tuple(-1.0 if value is None else value[0] for value in values)

    return sorted(groups, key=rank, reverse=True)
