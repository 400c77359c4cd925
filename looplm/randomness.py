"""Counter-based random draws: every draw is a pure function of a seed, a purpose and counters.

Knows nothing of models or training. Nothing here touches a global random state, so a run that is interrupted
and resumed makes the same draws without having saved any (the generators are rebuilt from their key).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["StepKey", "fold", "hash_uint64"]


def fold(seed: int, purpose: str, *counters: int) -> int:
    """Hash a seed, a purpose and counters into 63 bits.

    Args:
        seed: Any integer.
        purpose: What the number is for; different purposes give independent numbers.
        counters: Any integers, for example rank and micro-batch index.

    Returns:
        An integer in ``[0, 2**63)``, suitable as the seed of a generator.

    Example:
        >>> fold(0, "depth", 7) == fold(0, "depth", 7)
        True
        >>> fold(0, "depth", 7) == fold(0, "vector", 7)
        False
    """
    text = "/".join([str(int(seed)), purpose, *(str(int(counter)) for counter in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def hash_uint64(key: int, counters: np.ndarray) -> np.ndarray:
    """Hash each counter with a key (SplitMix64, Steele et al. 2014).

    Args:
        key: The stream's key, for example from :func:`fold`.
        counters: Integers of any shape.

    Returns:
        uint64 of the same shape; element i depends on ``key`` and ``counters[i]`` alone.

    Example:
        >>> hash_uint64(7, np.arange(3, dtype=np.uint64)).dtype
        dtype('uint64')
    """
    with np.errstate(over="ignore"):
        z = counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class StepKey:
    """Names one micro-batch of one run; all random draws of a training step derive from it.

    Attributes:
        seed: The run's seed.
        micro_batch: Number of training batches before this one, over the whole run.
        optimizer_step: Number of optimiser steps before this one; schedules run in it.
        rank: The process's rank. Every draw but the depth depends on it.

    Example:
        >>> key = StepKey(seed=0, micro_batch=5)
        >>> key.uniform("depth") == StepKey(seed=0, micro_batch=5).uniform("depth") != key.uniform("rows")
        True
    """

    seed: int
    micro_batch: int
    optimizer_step: int = 0
    rank: int = 0

    def fold(self, purpose: str) -> int:
        """Return a 63-bit seed for ``purpose`` on this rank."""
        return fold(self.seed, purpose, self.rank, self.micro_batch)

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a fresh generator for ``purpose``, on ``device``."""
        return torch.Generator(device=device).manual_seed(self.fold(purpose))

    def uniform(self, purpose: str) -> float:
        """Return a number in ``[0, 1)`` that is equal on every rank."""
        return (fold(self.seed, purpose, self.micro_batch) >> 10) / 2**53

    def subset(self, purpose: str, population: int, size: int) -> Tensor:
        """Return ``size`` of ``population`` indices, drawn without replacement, sorted, shape ``(size,)``."""
        return torch.randperm(population, generator=self.generator(purpose))[:size].sort().values
