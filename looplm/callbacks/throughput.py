"""How fast a run trains: tokens, loops and floating-point operations by second. Knows no module and no config."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor

__all__ = ["ThroughputMeter"]

Count: TypeAlias = Callable[[L.LightningModule, Any], float | Tensor]
"""What one micro-batch, just trained on, counts for: ``(pl_module, batch) -> number`` of this rank."""

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


def _num_tokens(pl_module: L.LightningModule, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            "ThroughputMeter counts the tokens of `input_ids`, which a batch does not have: give `tokens_fn`."
        )
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).sum() if mask is None else (mask != 0).sum()


def _attribute(name: str) -> Count:
    def count(pl_module: L.LightningModule, batch: Any) -> float | Tensor:
        value: float | Tensor = getattr(pl_module, name)
        return value

    return count


class ThroughputMeter(L.Callback):
    """Logs what training achieves, as means since the last log: all ranks together, by the clock on the wall.

    ============================= =====================================================================================
    key                           value
    ============================= =====================================================================================
    ``train/tokens_per_second``   tokens trained on, padding left out
    ``train/loops_per_second``    loops run forward on a batch, on one rank
    ``train/flops_per_step``      floating-point operations of an optimiser step, at the depths that were really drawn
    ``train/mfu``                 model FLOPs utilisation: operations by second over what the devices could do at best
    ============================= =====================================================================================

    Time includes loading and checkpoints and leaves validation out. Loops and operations come from the module's
    attributes ``loops_per_batch`` and ``flops_per_batch``, those of the micro-batch just trained on (``LoopLM`` has
    both; the latter is also the name that Lightning's ThroughputMonitor reads), or from a function. A module that has
    neither gets no such row. Lightning's own monitor can carry no loops, takes one number of operations for all
    batches of its window and logs nothing before a window of 100 is full; its table of devices is what is used here.

    Args:
        tokens_fn: Tokens of a micro-batch, ``(pl_module, batch)``; None: the non-zero ``attention_mask``, or all
            ``input_ids``.
        loops_fn: Loops of the micro-batch just trained on; None: ``pl_module.loops_per_batch``.
        flops_fn: Its floating-point operations on this rank; None: ``pl_module.flops_per_batch``.
        peak_flops: Operations by second that one device can do at best; None: Lightning's table of GPUs and TPUs (some
            of its numbers are with structured sparsity, twice what dense products reach). A CPU is not in it: there
            ``train/mfu`` needs this argument.

    Raises:
        ValueError: If ``peak_flops`` is not above 0, or given where nothing counts operations; or a batch has no
            ``input_ids`` and there is no ``tokens_fn``.

    Example:
        >>> meter = ThroughputMeter(tokens_fn=lambda module, batch: batch[0].numel(), peak_flops=1e11)
        >>> trainer = L.Trainer(callbacks=[meter], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        tokens_fn: Count | None = None,
        loops_fn: Count | None = None,
        flops_fn: Count | None = None,
        peak_flops: float | None = None,
    ) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"`peak_flops` must be > 0, got {peak_flops}.")
        self.counts: dict[str, Count | None] = {
            "tokens": _num_tokens if tokens_fn is None else tokens_fn,
            "loops": loops_fn,
            "flops": flops_fn,
        }
        self.peak_flops = peak_flops
        self._peak: float | None = peak_flops
        self._sums: dict[str, float | Tensor] = {}
        self._steps = 0
        self._since = 0.0
        self._paused_at: float | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find what can be counted, and what the device can do."""
        for name in ("loops", "flops"):
            if self.counts[name] is None and hasattr(pl_module, f"{name}_per_batch"):
                self.counts[name] = _attribute(f"{name}_per_batch")
        if self.counts["flops"] is None:
            if self.peak_flops is not None:
                raise ValueError(
                    f"`peak_flops` has no effect: {type(pl_module).__name__} has no `flops_per_batch`; give `flops_fn`."
                )
        elif self.peak_flops is None:
            dtype = next((d for name, d in _DTYPES.items() if str(trainer.precision).startswith(name)), torch.float32)
            self._peak = get_available_flops(trainer.strategy.root_device, dtype)

    def _restart(self, trainer: L.Trainer) -> None:
        self._sums, self._steps = {name: 0.0 for name, count in self.counts.items() if count is not None}, 0
        self._since = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._restart(trainer)
        self._paused_at = None  # a sanity check has stopped it

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock go on: at the end of a validation other callbacks may still draw."""
        if self._paused_at is not None:
            self._since += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a micro-batch; log where the trainer logs."""
        for name, count in self.counts.items():
            if count is not None:
                # A tensor is read when it is logged: until then no GPU is waited for.
                self._sums[name] = self._sums[name] + count(pl_module, batch)
        if trainer.fit_loop._should_accumulate():
            return
        self._steps += 1
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            pl_module.log_dict(self._rates(trainer))
            self._restart(trainer)

    def _rates(self, trainer: L.Trainer) -> dict[str, float]:
        device = trainer.strategy.root_device
        sums = torch.stack(
            [torch.as_tensor(value, device=device, dtype=torch.float32) for value in self._sums.values()]
        )
        # A list, which waits for the device: only then has the time passed that the work took.
        totals = dict(zip(self._sums, trainer.strategy.reduce(sums, reduce_op="sum").tolist(), strict=True))
        seconds = time.perf_counter() - self._since
        values = {"train/tokens_per_second": totals["tokens"] / seconds}
        if "loops" in totals:
            values["train/loops_per_second"] = totals["loops"] / trainer.world_size / seconds
        if "flops" in totals:
            values["train/flops_per_step"] = totals["flops"] / self._steps
            if self._peak is not None:
                values["train/mfu"] = totals["flops"] / seconds / (self._peak * trainer.world_size)
        return values
