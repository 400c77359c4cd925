"""An endless stream of training batches that begins where the trainer stands. Knows the trainer, no corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

__all__ = ["StreamOrigin", "TrainingStream", "batches_per_step", "rows_per_batch", "trained_batches"]


def trained_batches(trainer: L.Trainer | None) -> int:
    """Return how many micro-batches a trainer has behind it, those before a resume included.

    Example:
        >>> trained_batches(None)
        0
    """
    return 0 if trainer is None else trainer.fit_loop.epoch_loop.total_batch_idx + 1


def batches_per_step(trainer: L.Trainer | None) -> int:
    """Return how many micro-batches make an optimiser step.

    Example:
        >>> batches_per_step(None)
        1
    """
    return 1 if trainer is None else trainer.accumulate_grad_batches


def rows_per_batch(trainer: L.Trainer | None, batch_size: int) -> int:
    """Return how many rows of the stream a micro-batch takes, over all processes.

    Example:
        >>> rows_per_batch(None, 4)
        4
    """
    return batch_size * (1 if trainer is None else trainer.world_size)


@dataclass(frozen=True)
class StreamOrigin:
    """Where batches of one size begin: batch ``batch`` with row ``row`` of the stream, the next with what follows.

    A run that goes on with another number of processes, or other batches, begins where the one before stopped: the rows
    are counted, not the batches.

    Example:
        >>> StreamOrigin(batch=10, row=40).first_row(12, rows_per_batch=8)
        56
    """

    batch: int = 0
    row: int = 0

    def first_row(self, batch: int, rows_per_batch: int) -> int:
        """Return the row that a batch begins with."""
        return self.row + (batch - self.batch) * rows_per_batch

    def state(self, trainer: L.Trainer | None, batch_size: int) -> dict[str, int]:
        """Return what a checkpoint keeps: this, how many rows a batch has and how many batches there have been."""
        rows = rows_per_batch(trainer, batch_size)
        return {**asdict(self), "rows_per_batch": rows, "batches": trained_batches(trainer)}

    @classmethod
    def resumed(cls, state: Mapping[str, int], rows_per_batch: int) -> StreamOrigin:
        """Return where a run goes on that takes ``rows_per_batch``, from the :meth:`state` of a checkpoint.

        Example:
            >>> StreamOrigin.resumed({"batch": 0, "row": 0, "rows_per_batch": 4, "batches": 10}, 8)
            StreamOrigin(batch=10, row=40)
        """
        saved = cls(state["batch"], state["row"])
        if state["rows_per_batch"] == rows_per_batch:
            return saved
        return cls(state["batches"], saved.first_row(state["batches"], state["rows_per_batch"]))


class TrainingStream(IterableDataset[dict[str, Tensor]]):
    """Whole batches, endless; begins where the trainer stands, so that resuming neither repeats nor skips any.

    Where several micro-batches make a step, each has an entry ``num_labels``: how many labelled tokens they have on
    average. Losses divided by it are, accumulated, the mean over all tokens of the step.

    Args:
        batches: The batches from a number on.
        position: How many the trainer has behind it, asked when the stream is opened.
        per_step: How many make a step, asked then too.

    Example:
        >>> from itertools import count
        >>> batches = lambda start: ({"labels": torch.tensor([-100] + [7] * index)} for index in count(start))
        >>> stream = TrainingStream(batches, position=lambda: 5, per_step=lambda: 2)
        >>> [(len(batch["labels"]) - 1, batch["num_labels"].item()) for batch in islice(stream, 3)]
        [(5, 4.5), (6, 6.5), (7, 6.5)]
    """

    def __init__(
        self,
        batches: Callable[[int], Iterator[dict[str, Tensor]]],
        position: Callable[[], int],
        per_step: Callable[[], int] = lambda: 1,
    ) -> None:
        self.batches, self.position, self.per_step = batches, position, per_step

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start, size = self.position(), self.per_step()
        if size == 1:
            return self.batches(start)
        begun = start % size  # of a step: these are counted, and not given again
        return islice(_counted(self.batches(start - begun), size), begun, None)


def _counted(batches: Iterator[dict[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    while group := list(islice(batches, size)):
        num_labels = torch.stack([(batch["labels"] != -100).sum() for batch in group]).float().mean()
        for batch in group:
            yield {**batch, "num_labels": num_labels}
