"""Sharded checkpoints of FSDP 2, read without running code, and made one file. Knows their files; trains nothing.

torch unpickles ``.metadata`` and what is no tensor. Here nothing is built but the few classes that belong there.
"""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from looplm.durable import is_sharded, recover
from looplm.errors import InputError

__all__ = ["check_sharded", "first_failure", "read_sharded"]

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "builtins": {"set", "frozenset"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(_EmptyStateDictLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The parent unpickles anything: what weights_only refuses never reaches it.
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class _BytesPlanner(_Planner):
    def _should_include_key(self, key: str, metadata: Metadata) -> bool:
        return isinstance(metadata.state_dict_metadata[key], BytesStorageMetadata)


def read_sharded(path: Path) -> dict[str, Any]:
    """Return what one process would have saved: ``state_dict``, ``optimizer_states`` and all that Lightning keeps.

    The whole checkpoint is in memory. Optimiser states come back numbered by parameter, as a single file has them.

    Raises:
        InputError: If it is no sharded checkpoint, damaged, or holds what could run code.

    Example:
        >>> import tempfile
        >>> import torch.distributed.checkpoint as dcp
        >>> folder = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> _ = dcp.save({"state_dict": {"weight": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)
        >>> torch.save({"global_step": 7}, folder / "meta.pt")
        >>> read_sharded(folder)["state_dict"]
        {'weight': tensor([1., 1.])}
    """
    recover(path)
    if not is_sharded(path):
        raise InputError(
            f"a sharded checkpoint must be a folder with .metadata and {_METADATA_FILENAME}, got {str(path)!r}."
        )
    try:
        content: dict[str, Any] = torch.load(path / _METADATA_FILENAME, weights_only=True)
        shards: dict[str, Any] = {}
        planner = _Planner()  # type: ignore[no-untyped-call]
        _load_state_dict(shards, storage_reader=_Reader(path), planner=planner, no_dist=True)
        states = [shards[name] for name in sorted(shards) if name.startswith("optimizer_")]
        content["state_dict"] = shards["state_dict"]
        content["optimizer_states"] = [_numbered(state) for state in states]
    except (Exception, CheckpointException) as error:
        raise _refusal(path, error) from None
    return content


def check_sharded(path: Path) -> set[str]:
    """Return the top-level keys of a sharded checkpoint after reading all of it that torch would unpickle.

    Tensors are left alone: torch reads them without running code.

    Raises:
        InputError: If it is damaged or holds what could run code.

    Example:
        >>> check_sharded(Path("runs/stars/checkpoints/last.ckpt"))  # doctest: +SKIP
        {'state_dict', 'optimizer_states', 'global_step'}
    """
    try:
        content = torch.load(path / _METADATA_FILENAME, weights_only=True)
        reader = _Reader(path)
        names = reader.read_metadata().state_dict_metadata
        planner = _BytesPlanner()  # type: ignore[no-untyped-call]
        _load_state_dict({}, storage_reader=_Reader(path), planner=planner, no_dist=True)
    except (Exception, CheckpointException) as error:
        raise _refusal(path, error) from None
    roots = {"optimizer_states" if name.startswith("optimizer_") else name.split(".")[0] for name in names}
    return {*content, *roots}


def first_failure(error: BaseException) -> str:
    """Return in one line what went wrong; torch gathers the errors of all ranks in one, which is no ``Exception``.

    Example:
        >>> first_failure(OSError("disk full"))
        'OSError: disk full'
    """
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _refusal(path: Path, error: BaseException) -> InputError:
    reason = first_failure(error)
    return InputError(f"{str(path)!r} is no sharded checkpoint of looplm, or damaged: {reason}")


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state by parameter number in place of name, in the order of its groups."""
    groups: list[dict[str, Any]] = []
    number: dict[str, int] = {}
    for group in state["param_groups"]:
        number |= {name: len(number) + offset for offset, name in enumerate(group["params"])}
        groups.append({**group, "params": [number[name] for name in group["params"]]})
    return {"state": {number[name]: values for name, values in state.get("state", {}).items()}, "param_groups": groups}
