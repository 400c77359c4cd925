"""A callback that ends its own process where a test wants it to end."""

from __future__ import annotations

import os
from typing import Any, Literal

import lightning as L


class Kill(L.Callback):
    """Sends ``number`` to its own process in the n-th batch of a step, or in the validation after it."""

    def __init__(self, step: int, number: int, where: Literal["step", "validation"] = "step", batch: int = 1) -> None:
        self.step, self.number, self.where, self.left = step, number, where, batch

    def _kill(self, where: str, step: int) -> None:
        self.left -= (where, step) == (self.where, self.step)
        if self.left == 0:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._kill("step", trainer.global_step + 1)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._kill("validation", trainer.global_step)
