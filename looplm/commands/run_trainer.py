"""Lightning's Trainer with its files in the run's directory, which also makes up for what a finished run owes."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from looplm.callbacks.owed_validation import OwedValidation

__all__ = ["RunTrainer"]


class RunTrainer(L.Trainer):
    """Trainer whose files stand in the run's directory, whatever folders of their own its loggers have.

    Example:
        >>> trainer = RunTrainer(accelerator="cpu", logger=False, default_root_dir="runs/stars")
        >>> trainer.log_dir
        'runs/stars'
    """

    @property
    def log_dir(self) -> str:
        """The run's directory, where callbacks write; like Lightning's own a broadcast, for which ranks wait."""
        return self.strategy.broadcast(self.default_root_dir)

    def _run_stage(self) -> Any:
        results = super()._run_stage()
        if self.state.fn == TrainerFn.FITTING:
            # Where `max_steps` is reached already, Lightning calls no hook of training.
            for callback in self.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, OwedValidation):
                    callback.make_up(self)
        return results
