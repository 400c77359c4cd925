"""The learning rate over a run, as a share of the full one. Knows optimiser steps, no optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LRSchedule"]


@dataclass(frozen=True, kw_only=True)
class LRSchedule:
    """Linear warm-up, then cosine decay until the last optimiser step, or constant and linear decay at the end.

    ``factor(s) = (s + 1) / warmup_steps`` before ``warmup_steps``, then
    ``min_ratio + (1 − min_ratio)·(1 + cos(π·(s − warmup_steps) / (max_steps − warmup_steps))) / 2``. With
    ``decay_steps`` instead ``min_ratio + (1 − min_ratio)·min(1, (max_steps − s) / decay_steps)``
    (warm-up–stable–decay, arXiv 2404.06395).

    Example:
        >>> [LRSchedule(warmup_steps=2, decay_steps=4).factor(step, 10) for step in (0, 1, 5, 6, 8, 10)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """

    warmup_steps: int = 0
    """Optimiser steps until the full learning rate."""
    min_ratio: float = 0.0
    """Learning rate at the end, as a share of the full one."""
    decay_steps: int | None = None
    """Optimiser steps of linear decay at the end, after a constant rate; None: cosine decay from the warm-up on."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must be >= 0, got {self.warmup_steps}.")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"`decay_steps` must be >= 1, got {self.decay_steps}.")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"`min_ratio` must be in [0, 1], got {self.min_ratio}.")

    def factor(self, step: int, max_steps: int) -> float:
        """Return the share of the full learning rate at an optimiser step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay_steps is not None:
            left = min(max(max_steps - step, 0) / self.decay_steps, 1.0)
            return self.min_ratio + (1 - self.min_ratio) * left
        progress = min((step - self.warmup_steps) / max(max_steps - self.warmup_steps, 1), 1.0)
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
