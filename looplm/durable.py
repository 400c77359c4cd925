"""Files and folders that are whole or not there, whatever ends the process or fills the disk.

Knows files and the names in a sharded checkpoint's folder, no models.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from looplm.errors import InputError, reason

__all__ = ["draft_of", "is_sharded", "recover", "remove", "replaced", "save_whole", "swap", "sync_directory"]

# In a folder of shards: what torch writes last, then what Lightning adds.
_WRITTEN_LAST = (".metadata", "meta.pt")


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


def is_sharded(path: Path) -> bool:
    """Return whether a path is a sharded checkpoint: a folder with the files that are written last.

    Example:
        >>> is_sharded(Path("no/such/folder"))
        False
    """
    return all(os.path.isfile(path / name) for name in _WRITTEN_LAST)


def draft_of(path: Path) -> Path:
    """Return where a file or folder is written before it takes the place of ``path``.

    What a killed process leaves behind has one name, so that it does not pile up.

    Example:
        >>> draft_of(Path("checkpoints/last.ckpt"))
        PosixPath('checkpoints/.last.ckpt.saving')
    """
    return path.with_name(f".{path.name}.saving")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as it is there and can be removed.

    Example:
        >>> remove(Path("no/such/folder"))
    """
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def swap(draft: Path, path: Path) -> None:
    """Put a complete ``draft``, folder or file, in the place of ``path``; :func:`recover` mends what a kill leaves.

    A file takes a file's place at once. A folder can only be put aside first: at every moment the old one or the new
    one is whole under its own name, or the old one under the name that it has aside.

    Raises:
        OSError: If it cannot be done; ``path`` is then as before.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "old").write_text("old"), (folder / "new").write_text("new")
        >>> swap(folder / "new", folder / "old")
        >>> (folder / "old").read_text()
        'new'
    """
    try:
        _exchange(draft, path)
    except OSError:
        # Once more: whoever read between the two renames has brought the old one back.
        _exchange(draft, path)
    sync_directory(path.parent)
    remove(_aside(path))


def _exchange(draft: Path, path: Path) -> None:
    if os.path.lexists(path) and (_is_folder(draft) or _is_folder(path)):
        # Only where the path is whole: without it, what is aside is the one that a kill left.
        remove(_aside(path))
        path.rename(_aside(path))
    try:
        draft.replace(path)
    except OSError:
        recover(path)
        raise


def recover(path: Path) -> None:
    """Bring back the checkpoint that a killed :func:`swap` had put aside; whoever reads one by its path begins so.

    Ranks and other processes may do it at the same time.

    Raises:
        InputError: If it cannot be brought back.

    Example:
        >>> recover(Path("no/such/last.ckpt"))  # nothing was put aside: nothing to do
    """
    if os.path.lexists(path):
        return
    aside = _aside(path)
    if not os.path.isfile(aside) and not is_sharded(aside):
        return
    try:
        aside.rename(path)
    except OSError as error:
        if not os.path.lexists(path):  # else another process was faster
            raise InputError(
                f"the checkpoint {str(path)!r} stands at {str(aside)!r}, where a killed process left it, and cannot be "
                f"brought back: {reason(error)}."
            ) from error


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path`` when it is complete and on the disk, and never before.

    That may be a sharded checkpoint, too; any other folder is left alone.

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
    temporary = draft_of(path)
    try:
        if os.path.isdir(path) and not is_sharded(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # a folder, where a run that wrote shards was killed
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        swap(temporary, path)
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
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "one.pt"
        >>> save_whole({"step": 7}, path)
        >>> torch.load(path, weights_only=True)
        {'step': 7}
    """
    import torch  # not above: commands that only look for a checkpoint start without it

    with replaced(path) as file:
        pipe = _Pipe(file)
        torch.save(content, cast(IO[bytes], pipe))
        if pipe.error is not None:
            raise pipe.error
