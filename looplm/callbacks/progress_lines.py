"""Progress as whole lines, for logs and pipes, where a bar that redraws itself would be one endless line.

Knows the trainer's counters and what the module logs for the progress bar; in any Lightning project.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

__all__ = ["ProgressLines"]


class ProgressLines(ProgressBar):
    """Writes a line now and then about training or an evaluation.

    Of training: step, speed, time left and what a bar would show; of validation and test the batches done.

    Args:
        every_seconds: Least time between two lines; the first and the last step have one in any case.

    Raises:
        ValueError: If ``every_seconds`` is negative.

    Example:
        >>> trainer = L.Trainer(callbacks=[ProgressLines(30)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        if not every_seconds >= 0:
            raise ValueError(f"`every_seconds` must be >= 0, got {every_seconds}.")
        self.every_seconds = every_seconds
        self._is_enabled = True
        self._started_at, self._first_step, self._last_at, self._last_step = 0.0, 0, float("-inf"), -1
        self._evaluated = 0

    def disable(self) -> None:
        """Write nothing, as Lightning asks of all ranks but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Write again."""
        self._is_enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started_at, self._first_step = time.monotonic(), trainer.global_step
        self._last_at, self._last_step = float("-inf"), -1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a line where it is time for one."""
        if time.monotonic() - self._last_at >= self.every_seconds:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write where training has ended."""
        self._write(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from zero."""
        self._evaluated = 0

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from zero, and say nothing of what is over at once."""
        self._evaluated, self._last_at = 0, time.monotonic()

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Write a line where it is time for one."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._write_evaluated("validation", batches)

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Write a line where it is time for one."""
        self._write_evaluated("test", trainer.num_test_batches)

    def _write_evaluated(self, stage: str, batches: Sequence[int | float]) -> None:
        self._evaluated += 1
        now = time.monotonic()
        if not self._is_enabled or now - self._last_at < self.every_seconds:
            return
        self._last_at = now
        total = sum(batches)
        of_total = f" of {int(total):,}" if total != float("inf") else ""
        sys.stdout.write(f"{stage}: batch {self._evaluated:,}{of_total}\n")
        sys.stdout.flush()

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, now = trainer.global_step, time.monotonic()
        if not self._is_enabled or step == self._last_step:
            return
        self._last_at, self._last_step = now, step
        done, seconds = step - self._first_step, max(now - self._started_at, 1e-9)
        most = trainer.estimated_stepping_batches
        head = f"step {step:,}"
        if most != float("inf"):
            head += f" of {int(most):,}"
        parts = [f"{head}, {done / seconds:.3g} steps/s"]
        if most != float("inf") and done and step < most:
            parts.append(f"{_clock((most - step) * seconds / done)} left")
        metrics = self.get_metrics(trainer, pl_module)
        shown = ", ".join(f"{name} {_number(value)}" for name, value in metrics.items() if name != "v_num")
        sys.stdout.write(", ".join(parts) + (f": {shown}" if shown else "") + "\n")
        sys.stdout.flush()


def _number(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor) else value
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
