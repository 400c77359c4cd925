"""A Hugging Face directory as found: on disk or the hub, and what it holds of a model beside its weights.

Knows files; builds no model.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from looplm.errors import InputError, reason
from looplm.families.rotary_table import ROTARY_TABLE
from looplm.origin import CARRIED, Origin, is_carried
from looplm.shards import PICKLE_SUFFIXES, Shards
from looplm.untrusted import read_object

__all__ = ["local_folder", "origin_of", "read_origin", "weights_dtype"]

_WANTED = ("config.json", "*.safetensors", "model.safetensors.index.json", *CARRIED)
_UNWANTED = ("*/*", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES))


def local_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """Return the directory itself, or where the hub's is kept on this machine.

    Raises:
        InputError: If it is neither a directory nor the name of one that the hub gives.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> local_folder(folder) == Path(folder)
        True
    """
    name = os.fspath(path_or_hub_id)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"a model must be a directory or a hub id `owner/name`, got {name!r}.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except Exception as error:
        raise InputError(
            f"{name!r} is no directory and could not be fetched from the hub: {type(error).__name__} {reason(error)}"
        ) from None


def read_origin(folder: str | os.PathLike[str]) -> Origin:
    """Return the config fields of a Hugging Face directory and what belongs to its model; its weights may be missing.

    Raises:
        InputError: If it is no such directory.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text('{"model_type": "ouro"}')
        >>> read_origin(folder).config["model_type"]
        'ouro'
    """
    path = Path(folder)
    if not os.path.isdir(path):
        raise InputError(f"a model's directory must exist, got {str(path)!r}.")
    has_weights = any(path.glob("*.safetensors"))
    return origin_of(path, read_object(path / "config.json"), Shards(path) if has_weights else None)


def origin_of(folder: Path, fields: dict[str, Any], shards: Shards | None) -> Origin:
    """Return where the model of a directory comes from.

    Args:
        folder: The directory.
        fields: Those of its config.json.
        shards: Its weights; None: it has none.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "tokenizer.json").write_text("{}")
        >>> origin_of(folder, {"model_type": "ouro"}, None).files
        {'tokenizer.json': b'{}'}
    """
    names = sorted(file.name for file in folder.iterdir() if is_carried(file.name) and file.is_file())
    files = {name: (folder / name).read_bytes() for name in names}
    if shards is None:
        return Origin(config=fields, files=files)
    buffers = {ROTARY_TABLE: shards.read(ROTARY_TABLE)} if ROTARY_TABLE in shards.shapes else {}
    dtype = str(weights_dtype(shards)).removeprefix("torch.")
    return Origin(config=fields, files=files, dtype=dtype, buffers=buffers)


def weights_dtype(shards: Shards) -> torch.dtype:
    """Return the type that holds all weights of a directory.

    Example:
        >>> import tempfile
        >>> from looplm.shards import write_shards
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_shards(folder, {"weight": 4}, iter([("weight", torch.ones(2).half())]), max_shard_bytes=10**9)
        >>> weights_dtype(Shards(folder))
        torch.float16
    """
    return functools.reduce(torch.promote_types, {d for name, d in shards.dtypes.items() if name != ROTARY_TABLE})
