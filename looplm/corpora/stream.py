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

    Example:
        >>> import torch
        >>> stream = TrainingStream(lambda index: {"index": torch.tensor(index)}, position=lambda: 5)
        >>> next(iter(stream))["index"].item()
        5
    """

    def __init__(self, make_batch: Callable[[int], dict[str, Tensor]], position: Callable[[], int]) -> None:
        self.make_batch, self.position = make_batch, position

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        micro_batch = self.position()
        while True:
            yield self.make_batch(micro_batch)
            micro_batch += 1
