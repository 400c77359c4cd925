"""Lightning's checkpoint files, written by :mod:`looplm.durable` and read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from looplm.durable import draft_of, recover, remove, save_whole

__all__ = ["DurableCheckpointIO"]


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside the old one, synced and renamed; read without running code.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(accelerator="cpu", plugins=[DurableCheckpointIO()], logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, also where a sharded one stands.

        Raises:
            InputError: If it cannot be written; the one before is then whole.
        """
        if "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_whole(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` is true unless it is set to False."""
        weights_only = True if weights_only is None else weights_only
        recover(Path(path))
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file or a folder; of a folder no half is left under its name."""
        path = Path(path)
        if path.is_dir() and not path.is_symlink():
            remove(draft_of(path))
            path = path.rename(draft_of(path))
        super().remove_checkpoint(path)
