"""One process's gradient goes bad: what the others must hear of."""

from __future__ import annotations

import lightning as L
from torch.distributed.tensor import DTensor


class BadRank(L.Callback):
    """Make the gradients of one rank NaN in one step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            for parameter in pl_module.parameters():
                grad = parameter.grad
                if grad is not None:
                    (grad.to_local() if isinstance(grad, DTensor) else grad).fill_(float("nan"))
