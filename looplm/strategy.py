"""FSDP 2: Lightning's ModelParallelStrategy with sizes that cannot be wrong and checkpoints that are whole.

Knows processes and files; which parts of a model are sharded says :func:`looplm.parallel.shard_looped`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from looplm.checkpoint_io import DurableCheckpointIO
from looplm.durable import draft_of, is_sharded, recover, remove, swap, sync_directory
from looplm.errors import InputError
from looplm.sharded_checkpoints import check_sharded, first_failure

__all__ = ["ShardedStrategy"]


class ShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all processes.

    Lightning's own defaults make all processes of a node one tensor-parallel group; a model without tensor parallelism
    then trains on each of them alone, and nothing says so.

    Args:
        save_distributed_checkpoint: Every rank writes its shards into a folder, for models that one process cannot
            hold; ``python -m looplm consolidate`` makes one file of it. Otherwise rank zero writes one ordinary file.
        process_group_backend: ``nccl``, ``gloo``; None: what suits the device.

    Example:
        >>> trainer = L.Trainer(strategy=ShardedStrategy(), devices=8)  # doctest: +SKIP
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        """Make the processes one data-parallel group, and its ordinary files whole ones unless a plugin writes them."""
        if self._checkpoint_io is None:
            self._checkpoint_io = DurableCheckpointIO()
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, complete or not at all.

        Raises:
            InputError: If a rank cannot write its part; the checkpoint before is then whole.
        """
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path)
            return
        draft = draft_of(path)
        if self.is_global_zero:
            remove(draft)  # a killed run may have been of more ranks, or have written one file
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, draft, storage_options)
            failure = None
        except (Exception, CheckpointException) as error:  # torch gathers the errors of all ranks, raises them on each
            failure = first_failure(error)
        # Rank zero alone writes what Lightning adds, and finishes: the others hear whether it could.
        if self.reduce_boolean_decision(failure is None) and self.is_global_zero:
            try:
                _finish(draft, path)
            except OSError as error:
                failure = first_failure(error)
        failure = self.broadcast(failure) or failure
        if failure is not None:
            raise InputError(f"the checkpoint {str(path)!r} could not be written; the one before is whole. {failure}")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint file or folder, written by any number of processes, without running code."""
        path = Path(checkpoint_path)
        recover(path)
        if is_sharded(path):
            check_sharded(path)  # refuses what torch's own reader would run
        return super().load_checkpoint(path, weights_only=True)


def _finish(draft: Path, path: Path) -> None:
    for file in draft.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    sync_directory(draft)
    swap(draft, path)
