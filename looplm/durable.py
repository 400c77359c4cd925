"""Files that are whole or not there, whatever ends the process or fills the disk. Knows files, no models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

from looplm.errors import InputError, reason

__all__ = ["replaced", "save_whole", "sync_directory"]

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
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
        kept = "the one before is whole" if os.path.exists(path) else "none was there before"
        raise InputError(f"the checkpoint {str(path)!r} could not be written: {reason(error)}; {kept}.") from error


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
