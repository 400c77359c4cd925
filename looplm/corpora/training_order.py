"""Which examples make up a batch of training: a function of seed, batch number and rank. Knows no trainer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from looplm.corpora.batches import Example
from looplm.corpora.corpus import Corpus
from looplm.corpora.interleave import Interleave, shuffled
from looplm.corpora.packing import Packing
from looplm.corpora.stream import StreamOrigin

__all__ = ["BUCKET", "Batching", "TrainingOrder", "bucketed"]

Batching = Literal["shuffled", "bucketed", "packed"]

_BEGINNING = StreamOrigin()
BUCKET = 32
"""Batches among which examples are sorted by length."""


def bucketed(lengths: np.ndarray, batch_size: int, seed: int, block: int) -> np.ndarray:
    """Return examples of a block in batches of like length, the batches in random order.

    Args:
        lengths: Tokens of each example, ``(n · batch_size,)``.
        batch_size: B.
        seed: Of the order.
        block: Number of the block.

    Returns:
        Indices into ``lengths``, ``(n, B)``.

    Example:
        >>> batches = bucketed(np.array([9, 1, 8, 2]), batch_size=2, seed=0, block=0)
        >>> sorted(sorted(batch) for batch in batches.tolist())
        [[0, 2], [1, 3]]
    """
    batches = np.argsort(lengths, kind="stable").reshape(-1, batch_size)
    ordered: np.ndarray = batches[shuffled(len(batches), seed, "bucket", block)]
    return ordered


class TrainingOrder:
    """The endless order of training.

    Args:
        corpora: The sources.
        batching: ``shuffled``: one example a row; ``bucketed``: the same, examples of like length together;
            ``packed``: rows filled with examples.
        batch_size: Rows of a batch on each process.
        row_tokens: Positions of a packed row.
        seed: Of all orders.
    """

    def __init__(
        self, corpora: Sequence[Corpus], batching: Batching, batch_size: int, row_tokens: int, seed: int
    ) -> None:
        self.corpora, self.batching, self.batch_size, self.seed = list(corpora), batching, batch_size, seed
        self.packings: list[Packing] = []
        sizes = [len(corpus) for corpus in corpora]
        if batching == "packed":
            # The last token of an example is never an input.
            self.packings = [
                Packing(corpus.lengths - 1, row_tokens, seed, number) for number, corpus in enumerate(corpora)
            ]
            sizes = [len(packing) for packing in self.packings]
        self.sizes = sizes
        self.interleave = Interleave(sizes, [corpus.source.weight for corpus in corpora], seed)

        @lru_cache(maxsize=2)
        def block(index: int, whole_batch: int, origin: int) -> np.ndarray:
            first = origin + index * BUCKET * whole_batch
            samples = [self.interleave(first + i) for i in range(BUCKET * whole_batch)]
            lengths = np.array([self.corpora[source].lengths[item] for source, item, _ in samples])
            return first + bucketed(lengths, whole_batch, seed, index)

        self._block = block

    @property
    def rows_per_epoch(self) -> int:
        """Rows until every source of the mix would have been seen once."""
        return sum(self.sizes)

    def indices(
        self, micro_batch: int, rank: int = 0, world_size: int = 1, origin: StreamOrigin = _BEGINNING
    ) -> np.ndarray:
        """Return the numbers in the stream of a batch's samples, int64 ``(B,)``; ranks share what one would read."""
        whole = self.batch_size * world_size
        if self.batching != "bucketed":
            first = origin.first_row(micro_batch, whole)
            return first + np.arange(rank * self.batch_size, (rank + 1) * self.batch_size)
        number = micro_batch - origin.batch
        batch: np.ndarray = self._block(number // BUCKET, whole, origin.row)[number % BUCKET]
        return batch[rank::world_size]

    def row(self, index: int) -> list[Example]:
        """Return the examples of row ``index`` of the stream; one unless rows are packed."""
        source, item, epoch = self.interleave(index)
        corpus = self.corpora[source]
        if self.batching != "packed":
            return [corpus.example(item)]
        return [corpus.example(int(document)) for document in self.packings[source].documents(item, epoch)]
