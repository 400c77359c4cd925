"""An endless stream of training batches that begins where the trainer stands. Knows the trainer, no corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning as L
from torch import Tensor
from torch.utils.data import IterableDataset

__all__ = ["TrainingStream", "trained_batches"]


def trained_batches(trainer: L.Trainer | None) -> int:
    """Return how many micro-batches a trainer has behind it, those before a resume included.

    Example:
        >>> trained_batches(None)
        0
    """
    return 0 if trainer is None else trainer.fit_loop.epoch_loop.total_batch_idx + 1


class TrainingStream(IterableDataset[dict[str, Tensor]]):
    """Whole batches, endless; begins where the trainer stands, so that resuming neither repeats nor skips any.

    Args:
        batches: The batches from a number on.
        position: How many the trainer has behind it, asked when the stream is opened.

    Example:
        >>> import torch
        >>> from itertools import count
        >>> batches = lambda start: ({"index": torch.tensor(index)} for index in count(start))
        >>> stream = TrainingStream(batches, position=lambda: 5)
        >>> next(iter(stream))["index"].item()
        5
    """

    def __init__(self, batches: Callable[[int], Iterator[dict[str, Tensor]]], position: Callable[[], int]) -> None:
        self.batches, self.position = batches, position

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.batches(self.position())
