"""Directories of safetensors files: their headers checked as a whole, read in small pieces, written in shards.

Knows names, shapes and bytes; no model and no config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from looplm.errors import InputError
from looplm.untrusted import is_file_name, read_object

__all__ = ["PICKLE_SUFFIXES", "Shards", "check_shapes", "write_shards"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".th", ".pkl", ".pickle", ".ckpt", ".joblib")
"""Endings, in lower case, of files that may run code when they are loaded."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"
_LIKE_A_PART = re.compile(r"model.*\.safetensors", re.IGNORECASE)
_PIECE_BYTES = 2**24


class Shards:
    """The tensors of a directory, whose files are mapped into memory piece by piece.

    Args:
        folder: Holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names.

    Raises:
        InputError: If the directory holds a pickle, no weights, or weights that no index names, or a file is missing,
            damaged or contradicts the index.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_shards(folder, {"weight": 8}, iter([("weight", torch.ones(2))]), max_shard_bytes=10**9)
        >>> Shards(folder).read("weight")
        tensor([1., 1.])
    """

    def __init__(self, folder: Path) -> None:
        names = sorted(path.name for path in folder.iterdir())
        pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
        if pickles:
            raise InputError(
                f"{str(folder)!r} holds pickle files, which can run code when they are loaded: {pickles}. Only "
                "safetensors are read; remove or convert them."
            )
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        index = self._index()
        files = sorted(set(index.values())) if index is not None else ["model.safetensors"]
        for file in files:
            self._read_header(folder / file)
        # Others' files may lie beside; one that is named like a part of the model would be left out silently.
        stray = [name for name in names if _LIKE_A_PART.fullmatch(name) and name not in files]
        if stray:
            where = _INDEX if index is not None else f"no {_INDEX}"
            raise InputError(f"{str(folder)!r} holds weights beside its own, which {where} names: {stray[:5]}.")
        for name, file in (index or {}).items():
            if self._files.get(name) != folder / file:
                raise InputError(f"{_INDEX} says that {name!r} is in {file}, which does not hold it.")
        unlisted = sorted(self._files.keys() - index.keys()) if index is not None else []
        if unlisted:
            raise InputError(f"{_INDEX} does not name the tensors {unlisted[:5]}.")

    def _index(self) -> dict[str, str] | None:
        path = self.folder / _INDEX
        if not path.is_file():
            return None
        index = read_object(path).get("weight_map")
        # A file name with a path in it would leave the directory.
        if not isinstance(index, dict) or not all(map(is_file_name, index.values())):
            raise InputError(f"{str(path)!r} must have a `weight_map` of tensors to files of the same directory.")
        return index

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{str(self.folder)!r} lacks the weights {path.name}.")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    piece = file.get_slice(name)
                    if piece.get_dtype() not in _DTYPES:
                        raise InputError(f"{path.name}: {name!r} must be of {list(_DTYPES)}, got {piece.get_dtype()}.")
                    if name in self._files:
                        raise InputError(f"{name!r} stands in {self._files[name].name} and in {path.name}.")
                    self._files[name] = path
                    self.shapes[name] = tuple(piece.get_shape())
                    self.dtypes[name] = _DTYPES[piece.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{str(path)!r} is damaged, or no safetensors file: {error}.") from None

    def read(self, name: str) -> Tensor:
        """Return a copy of a whole tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            read: Tensor = file.get_tensor(name).clone()
            return read

    def copy_rows(self, name: str, start: int, target: Tensor) -> None:
        """Fill ``target``, in its own dtype and on its device, with as many elements as it has, from row ``start`` on.

        The file is mapped anew for every piece: pages of a mapping that stays count as memory of the process.
        """
        shape = self.shapes[name]
        row_size = max(int(torch.Size(shape[1:]).numel()), 1)
        flat = target.reshape(-1, row_size)
        rows = max(_PIECE_BYTES // (row_size * self.dtypes[name].itemsize), 1)
        for first in range(0, len(flat), rows):
            last = min(first + rows, len(flat))
            with safe_open(self._files[name], framework="pt") as file:
                piece = file.get_slice(name)[start + first : start + last]
                flat[first:last].copy_(piece.reshape(-1, row_size))
                del piece


def check_shapes(
    where: str,
    expected: Mapping[str, Sequence[int]],
    found: Mapping[str, Sequence[int]],
    optional: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Compare names and shapes of tensors with what a model needs.

    Args:
        where: What the message calls the place where they were found.
        expected: Shapes that must be there.
        found: Shapes that are.
        optional: Shapes that may be there.

    Raises:
        InputError: Names what is missing, superfluous or of another shape.

    Example:
        >>> check_shapes("model", {"weight": (2, 3)}, {"weight": (2, 3)})
    """
    known = {**expected, **(optional or {})}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - known.keys())
    for what, names in (("lacks the tensors", missing), ("has superfluous tensors", extra)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise InputError(f"{where} {what} {names[:5]}{more}.")
    for name, shape in found.items():
        if tuple(shape) != tuple(known[name]):
            raise InputError(f"{where}: {name!r} must have the shape {tuple(known[name])}, got {tuple(shape)}.")


def write_shards(
    folder: Path, sizes: Mapping[str, int], tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int
) -> None:
    """Write tensors into ``model.safetensors``, or into several files and an index where they are too large for one.

    Args:
        folder: An existing directory.
        sizes: Bytes of each tensor, in the order in which they will come.
        tensors: Names and tensors; only one shard of them is held at a time.
        max_shard_bytes: Largest file, unless a single tensor is larger.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> tensors = iter([("a", torch.ones(2)), ("b", torch.ones(2))])
        >>> write_shards(folder, {"a": 8, "b": 8}, tensors, max_shard_bytes=8)
        >>> len(list(folder.glob("*.safetensors")))
        2
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = dict(next(tensors) for _ in names)
        save_file(content, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
