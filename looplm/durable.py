"""Checkpoint files that are whole or not there, whatever ends the process or fills the disk. Knows files, no models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from looplm.errors import InputError

__all__ = ["DurableCheckpointIO", "replaced", "save_whole", "sync_directory"]

_SUFFIX = ".saving"


def sync_directory(folder: Path) -> None:
    """Make renames in a folder outlast a loss of power.

    Example:
        >>> import tempfile
        >>> sync_directory(Path(tempfile.mkdtemp()))
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path`` when it is complete and on the disk, and never before.

    What a killed process leaves behind has one name, so that it does not pile up.

    Raises:
        InputError: If it cannot be written; ``path`` is then as before.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "file"
        >>> with replaced(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    temporary = path.with_name(f".{path.name}{_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "the one before is whole" if path.exists() else "none was there before"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(f"the checkpoint {str(path)!r} could not be written: {reason}; {kept}.") from error


class _Pipe:
    """What ``torch.save`` writes to. After an error it takes what comes and drops it: torch's writer never gives up."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def save_whole(content: Any, path: Path) -> None:
    """Write what ``torch.save`` makes of ``content``; see :func:`replaced`.

    Raises:
        InputError: If it cannot be written; ``path`` is then as before.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.pt"
        >>> save_whole({"step": 7}, path)
        >>> torch.load(path, weights_only=True)
        {'step': 7}
    """
    with replaced(path) as file:
        pipe = _Pipe(file)
        torch.save(content, cast(IO[bytes], pipe))
        if pipe.error is not None:
            raise pipe.error


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside the old one, synced and renamed; read without running code.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(accelerator="cpu", plugins=[DurableCheckpointIO()], logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

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
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only)
