"""Choosing the next token from logits. Knows tensors and counters; no model.

Every draw is a function of the seed, the row and the place in the continuation, so that a row's answer depends neither
on its neighbours nor on a global random state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from looplm.randomness import fold, hash_uint64

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Greedy choice, or a draw from the tempered distribution restricted to its likeliest tokens.

    Raises:
        ValueError: If a number is outside its range, or has no effect because the choice is greedy.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
        >>> Sampling()(logits, torch.tensor([0]), 0)
        tensor([1])
        >>> Sampling(temperature=1.0, top_k=1, seed=7)(logits, torch.tensor([0]), 0)
        tensor([1])
    """

    temperature: float = 0.0
    """Divides the logits; 0: greedy."""
    top_k: int | None = None
    """Only the k likeliest tokens; None: all."""
    top_p: float | None = None
    """Only the fewest tokens, likeliest first, whose probability reaches p; None: all."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "seed"):
            value, integer = getattr(self, name), name in ("top_k", "seed")
            if value is None and name.startswith("top_"):
                continue
            if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
                raise ValueError(f"`{name}` must be {'an integer' if integer else 'a number'}, got {value!r}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be >= 0 and finite, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be >= 1, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("`top_k` and `top_p` have no effect with `temperature: 0`, which is greedy.")

    def __call__(self, logits: Tensor, rows: Tensor, place: int) -> Tensor:
        """Choose one token a row.

        Args:
            logits: ``(R, V)``.
            rows: What names each row, for example its index in the whole batch, int64 ``(R,)``.
            place: How many tokens have been generated before.

        Returns:
            int64 ``(R,)``.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        # From the likeliest down and in float64: a tiny temperature must not overflow.
        logits = logits.double()
        tempered = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        ordered, tokens = tempered.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ordered, tokens = ordered[:, : self.top_k], tokens[:, : self.top_k]
        probabilities = ordered.softmax(-1)
        if self.top_p is not None:
            # A token stays while those before it have not reached p; the likeliest always stays.
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        cumulative = probabilities.cumsum(-1)
        bits = hash_uint64(fold(self.seed, "sample", place), rows.cpu().numpy())
        uniform = torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) / 2**53).to(logits.device)
        place_in_order = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
        return tokens.gather(-1, place_in_order.clamp(max=tokens.shape[-1] - 1)).squeeze(-1)
