"""Lightning's ModelCheckpoint in the run's directory, with a ``last.ckpt`` that is the last and always there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from looplm.durable import draft_of, remove, swap

__all__ = ["RunCheckpoint"]


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint in the run's directory whose ``last.ckpt`` is there from the first save to the end of a run.

    What differs from Lightning's own:

    - it stands where ``test`` finds it, not in a folder of the first logger;
    - ``last.ckpt`` also holds the last step of a run, not the last multiple of ``every_n_train_steps``;
    - ``monitor`` decides which best files are kept, when it has just been measured and with the weights that it was
      measured on; ``last.ckpt`` does not wait for it, and with ``save_last: link`` is a file where no best one holds
      the same step;
    - nothing is saved while gradients are being accumulated, which no checkpoint holds: what is due waits for the
      step. A best file is the exception, because after the step it would be of other weights.

    Example:
        >>> trainer = L.Trainer(callbacks=[RunCheckpoint(save_last=True)], accelerator="cpu", logger=False)
    """

    _waits_for_step = False
    _num_saved = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the folder, unless the config names one."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every n-th step or as many minutes, and what an accumulation has kept waiting."""
        if _saves_nothing(trainer) or trainer.fit_loop._should_accumulate():
            return
        if self._is_due(trainer) or self._waits_for_step:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save if this validation is among the best, or the end of an epoch or of the run."""
        if _saves_nothing(trainer):
            return
        num_saved = self._num_saved
        if self._is_due_by_epoch(trainer) and not self._should_save_on_train_epoch_end(trainer):
            self._save(trainer)
        elif self.monitor is not None and not self._every_n_epochs:
            self._save(trainer, also_no_best=False)
        is_last_step = 0 <= trainer.fit_loop.epoch_loop.max_steps <= trainer.global_step
        if is_last_step and self._num_saved == num_saved:
            self._renew_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save every n epochs."""
        if _saves_nothing(trainer) or not self._is_due_by_epoch(trainer):
            return
        if self._should_save_on_train_epoch_end(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the last multiple left out."""
        is_saved = self._last_checkpoint_saved and self._last_global_step_saved == trainer.global_step
        if not is_saved or self._waits_for_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was kept, the score of the newest included, which Lightning saves and leaves out here."""
        super().load_state_dict(state_dict)
        if state_dict.get("dirpath") == self.dirpath:
            self.current_score = state_dict.get("current_score")

    def _is_due(self, trainer: L.Trainer) -> bool:
        every, interval, now = self._every_n_train_steps, self._train_time_interval, time.monotonic()
        if every >= 1 and trainer.global_step % every == 0:
            return True
        if interval is None or self._last_time_checked is None:
            return False
        # Clocks of ranks differ.
        is_time = trainer.strategy.broadcast(now - self._last_time_checked >= interval.total_seconds())
        if is_time:
            self._last_time_checked = now
        return is_time

    def _is_due_by_epoch(self, trainer: L.Trainer) -> bool:
        return self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _save(self, trainer: L.Trainer, *, also_no_best: bool = True) -> None:
        """Save what ``save_top_k`` keeps, then ``last``, which knows of it; with ``also_no_best`` this in any case."""
        num_saved, is_new = self._num_saved, self._last_global_step_saved != trainer.global_step
        is_amid_step = trainer.fit_loop._should_accumulate()
        if self._is_measured(trainer) if self.monitor is not None else is_new and not is_amid_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        is_best = self._num_saved > num_saved
        if is_best and is_amid_step:
            rank_zero_warn(
                "A best checkpoint is saved while gradients are being accumulated: its weights are those that were "
                "measured, but what goes on from it lacks the gradients so far. Make `trainer.val_check_interval` a "
                "multiple of `trainer.accumulate_grad_batches`."
            )
        if is_best or (is_new and also_no_best):
            self._waits_for_step = is_amid_step
            if not is_amid_step:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _is_measured(self, trainer: L.Trainer) -> bool:
        """Return whether what is monitored belongs to these weights, or is nowhere to be found, which is an error."""
        # What an earlier validation measured stays in `callback_metrics`; a resumed run may not have measured it yet.
        is_known = self.monitor in trainer.callback_metrics or bool(self.best_k_models)
        is_missing = bool(trainer.validating) and not is_known
        return is_missing or self.monitor in trainer._logger_connector.metrics["callback"]

    def _renew_last(self, trainer: L.Trainer) -> None:
        """Save the last step once more, now that its validation is no longer owed."""
        if not self.save_last or self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        else:
            self._save_checkpoint(trainer, self._last_checkpoint_saved)  # itself, or what it links to

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._num_saved += 1

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._last_checkpoint_saved = ""  # of other weights: nothing to link to
        super()._save_last_checkpoint(trainer, monitor_candidates)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        # It may be what ``last.ckpt`` links to, which Lightning renews afterwards.
        if self.save_last == "link":
            last = self.format_checkpoint_name(self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST)
            self._link_checkpoint(trainer, self._last_checkpoint_saved, last)
        super()._remove_checkpoint(trainer, filepath)

    @staticmethod
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        # Lightning removes the old link before it makes the new one: killed in between, a run would begin anew.
        link = Path(linkpath)
        if trainer.is_global_zero and Path(filepath).absolute() != link.absolute():
            draft = draft_of(link)
            remove(draft)
            draft.symlink_to(os.path.relpath(filepath, link.parent))
            swap(draft, link)
        trainer.strategy.barrier()


def _saves_nothing(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run) or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking  # type: ignore[attr-defined]
