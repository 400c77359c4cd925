"""How many loops a training step runs: distributions over depth, drawn from one uniform number.

Knows nothing of models. A sampler is its probability mass function; the draw inverts its distribution, so the
documented mean is the true mean of what is drawn, and equal uniforms give equal depths on every rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from looplm.randomness import StepKey

__all__ = [
    "DepthSampler",
    "DepthStage",
    "FixedDepth",
    "LogNormalDepth",
    "LogUniformDepth",
    "PoissonDepth",
    "ScheduledDepth",
    "UniformDepth",
    "check_starts",
]


class DepthSampler(ABC):
    """A distribution P over the number of loops of a training step.

    Example:
        >>> sampler: DepthSampler = PoissonDepth(4.0)
        >>> round(sampler.mean, 1)
        4.0
    """

    @abstractmethod
    def pmf(self) -> np.ndarray:
        """Return the probabilities of depths 0, 1, 2, …, shape ``(max_depth + 1,)``, float64, summing to 1."""

    @property
    def mean(self) -> float:
        """The mean of what is drawn, rounding and clipping included (loops)."""
        return float(np.arange(len(self._cdf)) @ self.pmf())

    def at_step(self, optimizer_step: int) -> DepthSampler:
        """Return the sampler in force at an optimiser step."""
        return self

    def quantile(self, u: float) -> int:
        """Return the smallest depth whose cumulative probability exceeds ``u`` in ``[0, 1)``."""
        return int(np.searchsorted(self._cdf, u, side="right"))

    def sample(self, key: StepKey) -> int:
        """Draw the depth of one training step: a pure function of (seed, micro-batch), equal on every rank."""
        return self.at_step(key.optimizer_step).quantile(key.uniform("depth"))

    @cached_property
    def _cdf(self) -> np.ndarray:
        cdf = np.cumsum(self.pmf())
        normed: np.ndarray = cdf / cdf[-1]
        return normed


def check_starts(name: str, starts: Sequence[int]) -> None:
    """Check the first steps of the stages of a schedule.

    Raises:
        ValueError: If they do not begin at 0 or do not increase; the message calls the stages ``name``.

    Example:
        >>> check_starts("stages", [0, 100])
        >>> check_starts("stages", [5])
        Traceback (most recent call last):
        ...
        ValueError: ...
    """
    if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise ValueError(f"`start_step` of the `{name}` must begin at 0 and increase, got {list(starts)}.")


def _check_range(min_depth: int, max_depth: int) -> None:
    if min_depth < 1:
        raise ValueError(f"`min_depth` must be >= 1, got {min_depth}.")
    if max_depth < min_depth:
        raise ValueError(f"`max_depth` must be >= `min_depth` ({min_depth}), got {max_depth}.")


class FixedDepth(DepthSampler):
    """Always the same depth: the baseline of the paper, with 4 loops.

    Example:
        >>> FixedDepth(4).mean
        4.0
    """

    def __init__(self, depth: int = 4) -> None:
        if depth < 1:
            raise ValueError(f"`depth` must be >= 1, got {depth}.")
        self.depth = depth

    def pmf(self) -> np.ndarray:
        """Return all mass at ``depth``."""
        pmf: np.ndarray = np.eye(self.depth + 1)[self.depth]
        return pmf


class UniformDepth(DepthSampler):
    """Every depth from ``min_depth`` to ``max_depth``, both included, equally often.

    Example:
        >>> UniformDepth(1, 8).mean
        4.5
    """

    def __init__(self, min_depth: int = 1, max_depth: int = 16) -> None:
        _check_range(min_depth, max_depth)
        self.min_depth, self.max_depth = min_depth, max_depth

    def pmf(self) -> np.ndarray:
        """Return ``1 / (max_depth − min_depth + 1)`` on the range."""
        probabilities = np.zeros(self.max_depth + 1)
        probabilities[self.min_depth :] = 1 / (self.max_depth - self.min_depth + 1)
        return probabilities


class PoissonDepth(DepthSampler):
    """``clip(N, min_depth, max_depth)`` with N Poisson of rate ``rate``; clipping makes the mean differ from it.

    Example:
        >>> round(PoissonDepth(4.0, 1, 64).mean, 3)
        4.018
    """

    def __init__(self, rate: float = 4.0, min_depth: int = 1, max_depth: int = 64) -> None:
        _check_range(min_depth, max_depth)
        if not rate > 0:
            raise ValueError(f"`rate` must be > 0, got {rate}.")
        self.rate, self.min_depth, self.max_depth = rate, min_depth, max_depth

    def pmf(self) -> np.ndarray:
        """Return the Poisson probabilities, the mass outside the range put on its ends."""
        counts = range(self.max_depth)
        logs = np.array([n * math.log(self.rate) - self.rate - math.lgamma(n + 1) for n in counts])
        probabilities = np.append(np.exp(logs), 0.0)
        probabilities[-1] = max(1 - probabilities.sum(), 0.0)
        probabilities[self.min_depth] += probabilities[: self.min_depth].sum()
        probabilities[: self.min_depth] = 0.0
        return probabilities


class LogNormalDepth(DepthSampler):
    """``clip(round(exp(N(mu, sigma²))), min_depth, max_depth)``: the paper's random loop sampling (section 4).

    Example:
        >>> round(LogNormalDepth(mu=1.7, sigma=0.4, min_depth=1, max_depth=16).mean, 2)
        5.92
    """

    def __init__(self, mu: float = 2.0, sigma: float = 0.7, min_depth: int = 1, max_depth: int = 100) -> None:
        _check_range(min_depth, max_depth)
        if not sigma > 0:
            raise ValueError(f"`sigma` must be > 0, got {sigma}.")
        self.mu, self.sigma, self.min_depth, self.max_depth = mu, sigma, min_depth, max_depth

    def pmf(self) -> np.ndarray:
        """Return ``F(t + ½) − F(t − ½)`` of the log-normal F, the mass outside the range put on its ends."""
        edges = np.arange(self.min_depth, self.max_depth) + 0.5
        inner = [0.5 * math.erfc((self.mu - math.log(edge)) / (self.sigma * math.sqrt(2))) for edge in edges]
        return np.concatenate([np.zeros(self.min_depth), np.diff(np.array([0.0, *inner, 1.0]))])


class LogUniformDepth(DepthSampler):
    """``floor(exp(U(ln a, ln(b + 1))))`` on ``a = min_depth … b = max_depth``: every doubling of depth equally often.

    The heaviest tail of these samplers: ``P(t) = ln((t + 1) / t) / ln((b + 1) / a)``, nearly ``1 / t``.

    Example:
        >>> round(LogUniformDepth(8, 512).mean, 1)
        120.9
    """

    def __init__(self, min_depth: int = 1, max_depth: int = 128) -> None:
        _check_range(min_depth, max_depth)
        self.min_depth, self.max_depth = min_depth, max_depth

    def pmf(self) -> np.ndarray:
        """Return ``ln((t + 1) / t) / ln((max_depth + 1) / min_depth)`` on the range."""
        logs = np.diff(np.log(np.arange(self.min_depth, self.max_depth + 2)))
        return np.concatenate([np.zeros(self.min_depth), logs / logs.sum()])


@dataclass(frozen=True, kw_only=True)
class DepthStage:
    """One stage of a :class:`ScheduledDepth`.

    Example:
        >>> stage = DepthStage(start_step=1200, sampler=FixedDepth(8))
        >>> stage.sampler.mean
        8.0
    """

    start_step: int
    """Optimiser step from which ``sampler`` is in force."""
    sampler: DepthSampler
    """The distribution of this stage."""


class ScheduledDepth(DepthSampler):
    """Samplers that follow each other; mean and pmf are those of the last stage.

    Example:
        >>> stages = [DepthStage(start_step=0, sampler=FixedDepth(2)), DepthStage(start_step=9, sampler=FixedDepth(4))]
        >>> [ScheduledDepth(stages).at_step(step).mean for step in (8, 9)]
        [2.0, 4.0]
    """

    def __init__(self, stages: list[DepthStage]) -> None:
        check_starts("stages", [stage.start_step for stage in stages])
        self.stages = stages

    def pmf(self) -> np.ndarray:
        """Return the pmf of the last stage."""
        return self.stages[-1].sampler.pmf()

    def at_step(self, optimizer_step: int) -> DepthSampler:
        """Return the sampler of the last stage that has begun."""
        current = self.stages[0].sampler
        for stage in self.stages:
            if optimizer_step >= stage.start_step:
                current = stage.sampler.at_step(optimizer_step - stage.start_step)
        return current
