"""Peak bytes of all tensors alive in a training step, and how they grow with the depth."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from looplm.depth import FixedDepth
from looplm.randomness import StepKey

from .timing import Measurement, Row
from .training_step import STARS, addition_batch, addition_model

__all__ = ["PeakBytes", "memory_rows"]


class PeakBytes(TorchDispatchMode):
    """Sums the storages that operations return while they are alive; memory that a kernel uses inside is not seen.

    Example:
        >>> with PeakBytes() as peak:
        ...     a = torch.zeros(256)  # 1024 bytes
        ...     b = a + 1
        ...     del b
        ...     c = a[:10] + 1
        >>> peak.bytes
        2048
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.bytes = 0

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, key)
        self.bytes = max(self.bytes, self.now)
        return out


def _peak(num_loops: int, checkpoint_loops: Any) -> int:
    model = addition_model()
    objective = replace(STARS, depth_sampler=FixedDepth(num_loops), checkpoint_loops=checkpoint_loops)
    batch = addition_batch()
    with PeakBytes() as peak:
        objective(model, batch, StepKey(seed=0, micro_batch=0)).loss.backward()
    return peak.bytes + sum(parameter.nbytes for parameter in model.parameters())


def memory_rows(num_rounds: int) -> list[Row]:
    """The peak at 64 loops over that at 8; nothing is timed, so nothing is repeated."""
    rows = []
    for name, length, target in (("each loop checkpointed", 1, 3.2), ("segments of ⌈√t⌉ loops", "sqrt", 1.8)):
        ratio = Measurement.exact(_peak(64, length) / _peak(8, length))
        rows.append(Row(f"peak tensor bytes of a step at 64 loops, {name}", "at 8 loops", ratio, target, "at most"))
    return rows
