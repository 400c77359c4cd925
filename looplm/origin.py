"""Where a model's weights came from, for what is to be given back with them.

Knows files by name and content; nothing here reads a directory or runs what it carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looplm.errors import InputError
from looplm.shards import PICKLE_SUFFIXES
from looplm.untrusted import is_file_name, is_plain

__all__ = ["CARRIED", "Origin", "is_carried", "pack_origin", "unpack_origin"]

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.py",
)
"""What belongs to a model beside config and weights: all of a tokenizer, and a model's own code, which is not run."""


def is_carried(name: str) -> bool:
    """Return whether a file of that name goes along with a model; never one that ``save_pretrained`` writes itself.

    Example:
        >>> [is_carried(name) for name in ("tokenizer.json", "a.py", "../a.py", "config.json", "vocab.bin")]
        [True, True, False, False, False]
    """
    weights = Path(name).suffix.lower() in (*PICKLE_SUFFIXES, ".safetensors") if is_file_name(name) else True
    return not weights and any(fnmatchcase(name, pattern) for pattern in CARRIED)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model's weights came from.

    Raises:
        InputError: If a file may not go along, or the fields are not plain data: they may come from anyone's
            checkpoint, and are written to disk.

    Example:
        >>> Origin(config={"model_type": "ouro"}, files={"tokenizer.json": b"{}"}).config["model_type"]
        'ouro'
    """

    config: Mapping[str, Any]
    """The fields of its ``config.json``."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Tokenizer files and the like, by name; see :data:`CARRIED`."""
    dtype: str | None = None
    """Type of its weights, for example ``float32``; None: not known."""
    buffers: Mapping[str, Tensor] | None = field(default=None, compare=False)
    """Stored tensors that hold no weights, as they were; None: not known."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, Mapping) or not is_plain(dict(self.config)):
            raise InputError("`origin.config` must hold the fields of a config.json.")
        if not isinstance(self.files, Mapping) or not all(isinstance(data, bytes) for data in self.files.values()):
            raise InputError("`origin.files` must map names to bytes.")
        wrong = [name for name in self.files if not is_carried(name)]
        if wrong:
            raise InputError(f"`origin.files` must be named like one of {list(CARRIED)}, got {wrong[:3]!r:.200}.")
        if not (self.dtype is None or isinstance(self.dtype, str)):
            raise InputError(f"`origin.dtype` must be the name of a type, got {type(self.dtype).__name__}.")
        buffers = {} if self.buffers is None else self.buffers
        if not isinstance(buffers, Mapping) or not all(isinstance(part, Tensor) for part in buffers.values()):
            raise InputError("`origin.buffers` must map names to tensors.")


def pack_origin(origin: Origin | None) -> dict[str, Any]:
    """Return what a checkpoint holds of where its model came from: nothing, or ``origin`` as plain data and tensors.

    Example:
        >>> pack_origin(None)
        {}
    """
    if origin is None:
        return {}
    # Bytes as tensors: what a checkpoint holds must load without running code.
    files = {
        name: torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        for name, data in origin.files.items()
    }
    known = {} if origin.buffers is None else {"buffers": dict(origin.buffers)}
    return {"origin": {"config": dict(origin.config), "files": files, "dtype": origin.dtype, **known}}


def unpack_origin(content: Mapping[str, Any]) -> Origin | None:
    """Return what :func:`pack_origin` put into a checkpoint; else the tokenizer that a DataModule left there.

    Raises:
        InputError: If it is not what it must be.

    Example:
        >>> unpack_origin(pack_origin(Origin(config={"model_type": "ouro"}))).config
        {'model_type': 'ouro'}
    """
    packed = content.get("origin")
    if packed is None:
        data = content.get("MathDataModule")
        if not isinstance(data, dict) or "tokenizer_files" not in data:
            return None
        # The model is ours, and so are its fields; its own tokenizer travels with it.
        packed = {"config": {}, "files": data["tokenizer_files"]}
    packed = packed if isinstance(packed, dict) else {}
    files = packed.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(data, Tensor) and data.dtype == torch.uint8 for data in files.values()
    ):
        raise InputError("`origin.files` must map names to tensors of bytes.")
    return Origin(
        config=packed["config"] if "config" in packed else {},
        files={name: data.numpy().tobytes() for name, data in files.items()},
        dtype=packed.get("dtype"),
        buffers=packed.get("buffers"),
    )
