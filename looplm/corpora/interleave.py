"""The order of training: sample i of several sources as a function of (seed, i). Knows sizes and weights, no rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from looplm.errors import InputError
from looplm.randomness import fold

__all__ = ["BLOCK", "Interleave", "block_counts", "shuffled"]

BLOCK = 1024
"""Samples in which the weights hold exactly."""


def shuffled(size: int, seed: int, purpose: str, *counters: int) -> np.ndarray:
    """Return a permutation of ``size`` that the seed, the purpose and the counters decide, int64.

    Example:
        >>> sorted(shuffled(4, 0, "order").tolist())
        [0, 1, 2, 3]
        >>> shuffled(4, 0, "order").tolist() == shuffled(4, 0, "order").tolist()
        True
    """
    return np.random.default_rng(fold(seed, purpose, *counters)).permutation(size)


def block_counts(weights: Sequence[float]) -> np.ndarray:
    """Return how many of :data:`BLOCK` samples each weight gets: shares of them, rounded so that the sum is right.

    Raises:
        InputError: If a weight is too small to get any.

    Example:
        >>> block_counts([3, 1]).tolist()
        [768, 256]
    """
    exact = np.asarray(weights, dtype=float) / np.sum(weights) * BLOCK
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    most_left = np.argsort(counts - exact, kind="stable")
    counts[most_left[: BLOCK - counts.sum()]] += 1
    if (counts == 0).any():
        least = int(np.argmin(counts))
        raise InputError(f"`weight` must give a source 1 of {BLOCK} samples at least, got {list(weights)[least]}.")
    return counts


class Interleave:
    """Sources without end, mixed by weight: in every block of 1,024 samples each has its share, in random order.

    Within a source every item comes once before any comes again, in another order each time.

    Args:
        sizes: Items of each source.
        weights: Shares, relative to each other.
        seed: Of all orders.

    Example:
        >>> order = Interleave([3], [1.0], seed=0)
        >>> sorted(item for _, item, _ in map(order, range(3)))
        [0, 1, 2]
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.sizes, self.seed = list(sizes), seed
        self.counts = block_counts(weights)
        labels = np.repeat(np.arange(len(self.counts)), self.counts)

        @lru_cache(maxsize=2)
        def block(index: int) -> tuple[np.ndarray, np.ndarray]:
            sources = labels[shuffled(BLOCK, seed, "interleave", index)] if len(self.counts) > 1 else labels
            ranks = np.zeros(BLOCK, dtype=np.int64)
            for source in range(len(self.counts)):
                mine = sources == source
                ranks[mine] = np.arange(mine.sum())
            return sources, ranks

        @lru_cache(maxsize=2 * len(self.counts))
        def order(source: int, epoch: int) -> np.ndarray:
            return shuffled(self.sizes[source], seed, "order", source, epoch)

        self._block, self._order = block, order

    def source(self, index: int) -> int:
        """Return which source sample ``index`` comes from."""
        return int(self._block(index // BLOCK)[0][index % BLOCK])

    def __call__(self, index: int) -> tuple[int, int, int]:
        """Return source, item and epoch (how often each item of the source came before) of sample ``index``."""
        sources, ranks = self._block(index // BLOCK)
        source = int(sources[index % BLOCK])
        ordinal = index // BLOCK * int(self.counts[source]) + int(ranks[index % BLOCK])
        epoch, place = divmod(ordinal, self.sizes[source])
        return source, int(self._order(source, epoch)[place]), epoch
