"""A validation that the end of a process has cut off is run when the run goes on."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["OwedValidation"]


class OwedValidation(L.Callback):
    """Runs the validation that was due where a checkpoint was saved, before the first step of the run that goes on.

    Within a step Lightning saves first and validates then, and a resumed run begins with the next step: without this
    the validation is lost where a process ends in between, and with it a point of the curves, a measurement of the
    dynamics and a candidate for the best checkpoint. Here the checkpoint says what it owes. Metrics are logged at the
    step at which an undisturbed run logs them. A checkpoint that says nothing owes nothing.

    Belongs after all callbacks that prepare themselves in ``on_train_start`` and before the checkpoints.

    Example:
        >>> trainer = L.Trainer(accelerator="cpu", callbacks=[OwedValidation()], logger=False)
    """

    def __init__(self) -> None:
        self._owed_at: int | None = None  # batches of the whole training, the one that is being trained on included

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note whether a validation is due after this batch, before anything can be saved."""
        fetcher: Any = trainer.fit_loop._data_fetcher
        loop = trainer.fit_loop.epoch_loop
        self._owed_at = loop.batch_progress.total.ready if loop._should_check_val_fx(fetcher) else None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Owe nothing any more."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._owed_at = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make up for what is owed."""
        self.make_up(trainer)

    def make_up(self, trainer: L.Trainer) -> None:
        """Run the validation that is owed, if any, inside ``fit``; whoever skips ``on_train_start`` has to call it.

        Example:
            >>> owed = OwedValidation()
            >>> owed.make_up(L.Trainer(accelerator="cpu", callbacks=[owed], logger=False))  # owes nothing
        """
        counts: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        # A checkpoint amid a batch, as of an error, stands before the validation and not at it.
        if self._owed_at is not None and self._owed_at == counts.ready == counts.processed:
            if trainer.enable_validation:
                rank_zero_info(f"the validation that was due at step {trainer.global_step} comes first")
                _validate(trainer)
        self._owed_at = None

    def state_dict(self) -> dict[str, Any]:
        """Return the batch whose validation has not been completed."""
        return {"owed_at": self._owed_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what is owed."""
        self._owed_at = state_dict["owed_at"]


def _validate(trainer: L.Trainer) -> None:
    """Validate as Lightning's training loop does after a batch."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    counted, first_loop_iter = loop.batch_progress.state_dict(), connector._first_loop_iter
    loop.restarting = False  # else it goes on where the validation before has ended
    trainer.validating = True
    trainer.lightning_module.on_validation_model_zero_grad()
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter
    loop.batch_progress.load_state_dict(counted)  # Lightning counts this validation itself when training goes on
