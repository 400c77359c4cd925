"""Token rows into tensors: padded, or packed with a document number for every position. Knows no corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Example", "packed_batch", "padded_batch", "padded_prompts"]


@dataclass(frozen=True, slots=True)
class Example:
    """A row of tokens and where its labels begin.

    Example:
        >>> example = Example(np.array([5, 6, 7, 2]), num_prompt=2)  # two tokens of a question, two of a solution
        >>> padded_batch([example], pad_id=0)["labels"].tolist()
        [[-100, 7, 2]]
    """

    ids: np.ndarray
    """Prompt, solution, end mark, int32 ``(T,)``."""
    num_prompt: int
    """Tokens before the first that is predicted."""


def padded_batch(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Return a batch with one example a row.

    Position i of the inputs predicts token i + 1, so the last token of an example is never an input.

    Args:
        examples: B examples.
        pad_id: Id of padding.

    Returns:
        ``input_ids`` and ``labels`` int64 ``(B, T)``, −100 at prompt and padding; ``attention_mask`` bool ``(B, T)``.

    Example:
        >>> rows = [Example(np.array([5, 6, 2]), num_prompt=1), Example(np.array([5, 2]), num_prompt=1)]
        >>> padded_batch(rows, pad_id=0)["input_ids"].tolist()
        [[5, 6], [5, 0]]
    """
    length = max(max(len(example.ids) for example in examples) - 1, 1)
    tokens, labels, mask = _empty(len(examples), length, pad_id)
    for row, example in enumerate(examples):
        _place(tokens[row], labels[row], mask[row], 0, example, 1)
    return _tensors(tokens, labels, mask.astype(bool))


def packed_batch(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> dict[str, Tensor]:
    """Return a batch with several examples a row, each of which the model computes as if it were alone.

    Args:
        rows: The examples of each of B rows.
        length: T.
        pad_id: Id of padding.

    Returns:
        ``input_ids`` and ``labels`` int64 ``(B, T)``; ``attention_mask`` int64 ``(B, T)``: the number of the example
        in its row, from 1, 0 at padding. T is less than ``length`` where no row is that long.

    Example:
        >>> rows = [[Example(np.array([5, 6, 2]), num_prompt=1), Example(np.array([5, 2]), num_prompt=1)]]
        >>> packed_batch(rows, length=3, pad_id=0)["input_ids"].tolist()  # an end mark is no input
        [[5, 6, 5]]
    """
    longest = max(sum(max(len(example.ids) - 1, 0) for example in row) for row in rows)
    tokens, labels, mask = _empty(len(rows), max(min(length, longest), 1), pad_id)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples, start=1):
            start = _place(tokens[row], labels[row], mask[row], start, example, number)
    return _tensors(tokens, labels, mask)


def padded_prompts(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left, as generation reads them: ids int64 and mask bool, both ``(B, P)``.

    Example:
        >>> ids, mask = padded_prompts([np.array([5, 6]), np.array([7])], pad_id=0)
        >>> ids.tolist(), mask.int().tolist()
        ([[5, 6], [0, 7]], [[1, 1], [0, 1]])
    """
    length = max(map(len, prompts))
    tokens, mask = np.full((len(prompts), length), pad_id, dtype=np.int64), np.zeros((len(prompts), length), dtype=bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def _empty(rows: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (rows, length)
    return (
        np.full(shape, pad_id, dtype=np.int64),
        np.full(shape, -100, dtype=np.int64),
        np.zeros(shape, dtype=np.int64),
    )


def _place(tokens: np.ndarray, labels: np.ndarray, mask: np.ndarray, start: int, example: Example, number: int) -> int:
    """Write an example into a row; return where the next one begins."""
    end = start + max(len(example.ids) - 1, 0)
    tokens[start:end] = example.ids[:-1]
    mask[start:end] = number
    asked = min(start + max(example.num_prompt - 1, 0), end)
    labels[asked:end] = example.ids[len(example.ids) - (end - asked) :] if end > asked else 0
    return end


def _tensors(tokens: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
    return {
        "input_ids": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(mask),
    }
