"""Steps whose loss or gradient is not finite are left out; many in a row end the run. Knows no module and no config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from looplm.durable import save_whole
from looplm.errors import InputError

__all__ = ["NonFiniteGuard"]


class NonFiniteGuard(L.Callback):
    """Skips an optimiser step whose loss or gradient norm is NaN or infinite; after several in a row the run stops.

    A skipped step changes neither weights nor optimiser state, on no rank; schedules and the data go on. The count is
    logged as ``train/skipped_steps`` and survives a resume. When the run stops, ``non_finite/`` in the run's directory
    holds ``before.ckpt``, whose weights are those before the first of these steps, and for every rank the micro-batches
    of the last one.

    DeepSpeed keeps gradients to itself, so that no step can be skipped: there the first loss that is not finite stops
    the run, before its step.

    Args:
        max_in_a_row: Number of skipped steps in a row at which the run stops.

    Raises:
        ValueError: If ``max_in_a_row`` is below 1.

    Example:
        >>> trainer = L.Trainer(callbacks=[NonFiniteGuard(max_in_a_row=3)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"`max_in_a_row` must be >= 1, got {max_in_a_row}.")
        self.max_in_a_row = max_in_a_row
        self.skipped_steps = 0
        self.in_a_row = 0
        self._batches: list[Any] = []
        self._losses: list[Tensor] = []
        self._is_new_step = True

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"skipped_steps": self.skipped_steps, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the counts."""
        self.skipped_steps, self.in_a_row = int(state_dict["skipped_steps"]), int(state_dict["in_a_row"])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the micro-batches of a step."""
        if self._is_new_step:
            self._batches, self._losses, self._is_new_step = [], [], False
        self._batches.append(batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Remember the losses of a step; looking at them waits until its end, where a GPU is waited for anyway."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the gradients away where they, or a loss, are not finite: an optimiser passes over what has none."""
        self._is_new_step = True
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm: Any = get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Of no gradients, which is what DeepSpeed shows, the norm is a number of the CPU.
        device = self._losses[0].device if self._losses else norm.device
        values = torch.stack([value.float().to(device) for value in (norm, *self._losses)])
        # Losses differ by rank; all must skip the same steps.
        if trainer.strategy.reduce_boolean_decision(bool(values.isfinite().all())):
            self.in_a_row = 0
        else:
            for parameter in parameters:
                parameter.grad = None
            self.in_a_row += 1
            self.skipped_steps += 1
            if self.in_a_row == 1:
                rank_zero_warn(
                    f"step {trainer.global_step}{_depth(trainer)} is skipped: its loss or gradient is not finite."
                )
            if isinstance(trainer.strategy, DeepSpeedStrategy):
                self._stop(trainer, trainer.global_step)
        if self.skipped_steps:
            pl_module.log("train/skipped_steps", float(self.skipped_steps))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the run where too many steps in a row were skipped.

        Raises:
            InputError: Says at which step and depth, and where the checkpoint and the batch are.
        """
        if self.in_a_row >= self.max_in_a_row and self._is_new_step:
            self._stop(trainer, trainer.global_step - 1)

    def _stop(self, trainer: L.Trainer, step: int) -> None:
        folder = Path(trainer.default_root_dir) / "non_finite"
        in_a_row, self.in_a_row = self.in_a_row, 0  # a run that goes on from there may skip as many again
        trainer.save_checkpoint(folder / "before.ckpt", weights_only=False)
        save_whole(self._batches, folder / f"batches_rank_{trainer.global_rank}.pt")
        raise InputError(
            f"loss or gradient was not finite in {in_a_row} step(s) in a row, the last of them step "
            f"{step}{_depth(trainer)}: the run stops. {folder} holds a checkpoint from before and "
            "the batches; a smaller learning rate, `trainer.gradient_clip_val` or a lighter penalty may help."
        )


def _depth(trainer: L.Trainer) -> str:
    depth = float(trainer.callback_metrics.get("train/depth", math.nan))
    return "" if math.isnan(depth) else f" (depth {depth:.0f})"
