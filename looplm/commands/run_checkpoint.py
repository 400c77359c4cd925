"""Lightning's ModelCheckpoint in the run's directory, with a ``last.ckpt`` that is the last and always there."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from looplm.durable import draft_of, remove, swap

__all__ = ["RunCheckpoint"]


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint in the run's directory whose ``last.ckpt`` also holds the last step of a run.

    Lightning's own stands in a folder of the first logger, and keeps the last multiple of ``every_n_train_steps``:
    ``test`` would not find it, or read older weights.

    Example:
        >>> trainer = L.Trainer(callbacks=[RunCheckpoint(save_last=True)], accelerator="cpu", logger=False)
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the folder, unless the config names one."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the last multiple left out."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

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
