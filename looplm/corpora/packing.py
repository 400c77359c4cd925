"""Which documents share a row. Knows lengths, no tokens.

Documents are packed by length once; in every epoch those of equal length change places at random, so that rows are
new each time while their number, and with it the place of every row in the stream, stays.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from looplm.corpora.interleave import shuffled

__all__ = ["Packing", "best_fit"]


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack documents into rows, longest first, each where it leaves the least room (best-fit decreasing).

    Args:
        lengths: Tokens of each document, at most ``capacity``, int64 ``(N,)``, in descending order.
        capacity: Tokens of a row.

    Returns:
        The documents of each row, as indices into ``lengths``.

    Example:
        >>> best_fit(np.array([5, 4, 3, 2, 1]), 6)
        [[0, 4], [1, 3], [2]]
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by their room
    rooms = 0  # bit r is set where some row has room r
    for document, length in enumerate(lengths.tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        left = room - length
        if left > 0:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows


class Packing:
    """The rows of each epoch.

    Args:
        lengths: Tokens of each document, int64 ``(N,)``, at most ``capacity``.
        capacity: Tokens of a row.
        seed: Decides which of equally long documents go where.
        source: Number of the source, so that several have independent orders.

    Example:
        >>> packing = Packing(np.array([3, 5, 4, 2]), capacity=8, seed=0)
        >>> sorted(np.concatenate([packing.documents(row, epoch=0) for row in range(2)]).tolist())
        [0, 1, 2, 3]
    """

    def __init__(self, lengths: np.ndarray, capacity: int, seed: int, source: int = 0) -> None:
        by_length = np.argsort(-lengths, kind="stable")
        self.rows = best_fit(lengths[by_length], capacity)

        @lru_cache(maxsize=2)
        def places(epoch: int) -> np.ndarray:
            order = shuffled(len(lengths), seed, "packing", source, epoch)
            return order[np.argsort(-lengths[order], kind="stable")]

        self._places = places

    def __len__(self) -> int:
        return len(self.rows)

    def documents(self, row: int, epoch: int) -> np.ndarray:
        """Return the documents of a row in an epoch, int64."""
        return self._places(epoch)[self.rows[row]]
