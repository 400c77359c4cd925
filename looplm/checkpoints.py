"""Hugging Face directories in and out (Ouro, Huginn, our own), and checkpoints of training runs.

Knows files and models; the foreign names stand in :mod:`looplm.families`, nothing here trains or decodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

import looplm
from looplm.config import LoopedConfig
from looplm.errors import InputError
from looplm.families import Family, ForeignTensor, Part, family_named, family_of
from looplm.model import LoopedTransformer, Origin
from looplm.shards import Shards, write_shards

__all__ = [
    "from_pretrained",
    "load_checkpoint",
    "load_model",
    "local_folder",
    "pack_origin",
    "read_origin",
    "save_checkpoint",
    "save_pretrained",
]

# What belongs to a model beside config and weights: all of a tokenizer, and a model's own code, which is not run here.
_CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "configuration_*.py",
    "modeling_*.py",
)
_WANTED = ("config.json", "*.safetensors", "model.safetensors.index.json", *_CARRIED)
_OWN_TYPE = "looplm"


def load_model(source: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> LoopedTransformer:
    """Return the model of a checkpoint file or of a Hugging Face directory or hub id, in evaluation mode.

    Args:
        source: What :func:`load_checkpoint` or :func:`from_pretrained` takes.
        dtype: Type of the weights; None: that of the files.

    Raises:
        InputError: See there.
    """
    if not Path(source).is_file():
        return from_pretrained(source, dtype=dtype)
    model = load_checkpoint(source)
    for parameter in model.parameters():
        # Out of the mapped file: training may write a new checkpoint in its place.
        parameter.data = parameter.data.to(dtype or parameter.dtype, copy=True)
    return model


def from_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoopedTransformer:
    """Return the model of a Hugging Face directory, in evaluation mode.

    Weights go from the mapped file straight to their type and device, a few megabytes at a time. Nothing is loaded
    before the whole directory has been found right; pickles are refused.

    Args:
        path_or_hub_id: A directory with ``config.json`` and safetensors, or the name of one on the Hugging Face hub.
        dtype: Type of the weights; None: that of the files.
        device: Where the weights go.

    Raises:
        InputError: If the directory or one of its files is missing, damaged, or not what its config says.

    Example:
        >>> model = from_pretrained("ByteDance/Ouro-1.4B", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    folder = local_folder(path_or_hub_id)
    fields = _read_fields(folder)
    family, config = _read_config(fields)
    tensors = _tensors(family, config)
    shards = Shards(folder)
    table = _rotary_table(config) if family is not None and family.model_type == "huginn_raven" else None
    shards.check({tensor.name: tensor.shape for tensor in tensors}, optional=() if table is None else (_TABLE,))
    if table is not None and _TABLE in shards.shapes:
        stored = shards.read(_TABLE)
        if stored.shape != table.shape or not torch.allclose(stored.float(), table, atol=0.01):
            raise InputError(f"{str(folder)!r}: {_TABLE!r} is not the table of `rope_base` {config.rope_theta:g}.")
    if dtype is None:
        dtype = torch.float16 if set(shards.dtypes.values()) == {torch.float16} else torch.bfloat16
        for tensor in tensors:
            dtype = torch.promote_types(dtype, shards.dtypes[tensor.name])
    model = _empty_model(config, dtype, device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in tensors:
            row = 0
            for part in tensor.parts:
                target = parameters[part.name].data[part.start : part.stop]
                shards.copy_rows(tensor.name, row, target)
                row += target.numel() // max(int(torch.Size(tensor.shape[1:]).numel()), 1)
    model.origin = read_origin(folder)
    return model.eval()


def save_pretrained(
    model: LoopedTransformer,
    folder: str | os.PathLike[str],
    *,
    origin: Origin | None = None,
    num_loops: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model as a Hugging Face directory, complete or not at all.

    An Ouro or Huginn gets the original names of tensors and fields, so that its own code loads it; any other model gets
    our names and a ``config.json`` that describes the architecture without code.

    Args:
        model: The model.
        folder: A directory that does not exist yet, or is empty.
        origin: The config fields and tokenizer files to take over; None: those of where the model came from.
        num_loops: Usual number of loops; None: the origin's.
        max_shard_bytes: Largest weights file.

    Raises:
        InputError: If the directory cannot be written, or an Ouro or Huginn has neither ``num_loops`` nor an origin.
    """
    origin = model.origin if origin is None else origin
    family = family_of(model.config)
    tensors = _tensors(family, model.config)
    fields = _fields(model, family, origin, num_loops)
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"the output must be a new or empty directory, got {str(target)!r}.")
    weights = model.state_dict()
    table = {} if family is None or family.model_type != "huginn_raven" else {_TABLE: _rotary_table(model.config)}
    itemsize = {name: tensor.element_size() for name, tensor in weights.items()}
    sizes = {t.name: int(torch.Size(t.shape).numel()) * itemsize[t.parts[0].name] for t in tensors}
    sizes |= {name: tensor.nbytes for name, tensor in table.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{str(target)!r} must be a directory that can be written: {error.strerror}.") from None
    try:
        write_shards(draft, sizes, _foreign(tensors, weights, table), max_shard_bytes)
        (draft / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        for name, content in (origin.files if origin is not None else {}).items():
            (draft / name).write_bytes(content)
        draft.chmod(0o755)
        draft.replace(target)
    except OSError as error:
        raise InputError(f"{str(target)!r} could not be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _foreign(
    tensors: list[ForeignTensor], weights: dict[str, Tensor], table: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for tensor in tensors:
        parts = [weights[part.name][part.start : part.stop] for part in tensor.parts]
        # A copy: safetensors refuses tensors that share memory, as rows of one of ours do.
        yield tensor.name, torch.cat(parts).reshape(tensor.shape).contiguous().clone()
    yield from table.items()


def _fields(
    model: LoopedTransformer, family: Family | None, origin: Origin | None, num_loops: int | None
) -> dict[str, Any]:
    """Return the fields of config.json: the origin's, where they still describe the model."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    original = dict(origin.config) if origin is not None else {}
    if family is None:
        loops = original.get("num_loops") if num_loops is None else num_loops
        usual = {} if loops is None else {"num_loops": loops}
        architecture = {"architecture": model.config.to_dict()}
        return {"model_type": _OWN_TYPE, "looplm_version": looplm.__version__, **architecture, **usual, "dtype": dtype}
    if original.get("model_type") != family.model_type:
        original = {}
    loops = original.get(family.loops_field) if num_loops is None else num_loops
    if loops is None:
        raise InputError(
            f"`num_loops` must be given: config.json of {family.model_type!r} names the usual number of loops."
        )
    same = bool(original) and family.read_config(original) == family.read_config(family.write_config(model.config, 1))
    fields = {**original, family.loops_field: loops} if same else family.write_config(model.config, loops)
    key = "dtype" if "dtype" in fields else "torch_dtype"
    return {**fields, key: dtype}


def save_checkpoint(model: LoopedTransformer, path: str | os.PathLike[str]) -> None:
    """Write a model as a checkpoint of :class:`~looplm.module.LoopLM`, which ``test`` and ``predict`` can read.

    Raises:
        InputError: If the file cannot be written.
    """
    content: dict[str, Any] = {
        **pack_origin(model.origin),
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {"config": model.config.to_dict()},
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
    }
    target = Path(path)
    draft = target.with_name(f".{target.name}.draft")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, draft)
        draft.replace(target)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{str(target)!r} could not be written: {error}.") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def pack_origin(origin: Origin | None) -> dict[str, Any]:
    """Return what a checkpoint holds of where its model came from: nothing, or ``origin`` as plain data and tensors."""
    if origin is None:
        return {}
    # Bytes as tensors: what a checkpoint holds must load without running code. An empty file has no buffer.
    files = {name: torch.frombuffer(bytearray(d), dtype=torch.uint8) for name, d in origin.files.items() if d}
    return {"origin": {"config": origin.config, "files": files}}


def _as_bytes(files: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: data.numpy().tobytes() for name, data in files.items()}


def load_checkpoint(path: str | os.PathLike[str]) -> LoopedTransformer:
    """Return the model of a checkpoint that training or :func:`save_checkpoint` wrote, in evaluation mode.

    Raises:
        InputError: If the file is missing, damaged, or no checkpoint of looplm.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"the checkpoint must be a file, got {str(source)!r}.")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        config = LoopedConfig.from_dict(content["hyper_parameters"]["config"])
        prefix = "model."
        weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
        model = _empty_model(config, next(iter(weights.values())).dtype, "meta")
        model.load_state_dict(weights, assign=True)
        if "origin" in content:
            model.origin = Origin(config=content["origin"]["config"], files=_as_bytes(content["origin"]["files"]))
        elif "tokenizer_files" in content.get("MathDataModule", {}):  # its own tokenizer travels with the model
            model.origin = Origin(config={}, files=_as_bytes(content["MathDataModule"]["tokenizer_files"]))
    except Exception as error:
        raise InputError(
            f"{str(source)!r} is no checkpoint of looplm, or damaged ({type(error).__name__}: {str(error)[:200]})."
        ) from None
    return model.eval()


def read_origin(folder: str | os.PathLike[str]) -> Origin:
    """Return the config fields of a Hugging Face directory and the files that belong to its model.

    Raises:
        InputError: If it is no such directory.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"a model's directory must exist, got {str(path)!r}.")
    names = sorted({file.name for pattern in _CARRIED for file in path.glob(pattern) if file.is_file()})
    return Origin(config=_read_fields(path), files={name: (path / name).read_bytes() for name in names})


def local_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """Return the directory itself, or where the hub's is kept on this machine.

    Raises:
        InputError: If it is neither a directory nor the name of one that the hub gives.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    name = os.fspath(path_or_hub_id)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"a model must be a directory or a hub id `owner/name`, got {name!r}.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"{name!r} is no directory and could not be fetched from the hub: {type(error).__name__} {reason}"
        ) from None


def _read_fields(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{str(folder)!r} has no readable config.json.") from None
    except ValueError as error:
        raise InputError(f"{str(folder / 'config.json')!r} is no JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise InputError(f"{str(folder / 'config.json')!r} must hold an object, got {type(fields).__name__}.")
    return fields


def _read_config(fields: dict[str, Any]) -> tuple[Family | None, LoopedConfig]:
    if fields.get("model_type") != _OWN_TYPE:
        family = family_named(fields.get("model_type"))
        return family, family.read_config(fields)
    try:
        return None, LoopedConfig.from_dict(fields["architecture"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"config.json: `architecture` is not one of looplm: {error}") from None


def _tensors(family: Family | None, config: LoopedConfig) -> list[ForeignTensor]:
    """Return the tensors of a directory; in our own family each is one of ours."""
    if family is not None:
        return family.tensors(config)
    shapes = {name: tuple(p.shape) for name, p in _empty_model(config, torch.float32, "meta").named_parameters()}
    return [ForeignTensor(name, shape, (Part(name, 0, shape[0]),)) for name, shape in shapes.items()]


def _empty_model(config: LoopedConfig, dtype: torch.dtype, device: torch.device | str) -> LoopedTransformer:
    """Return a model whose weights have their place and type but no values."""
    with torch.device("meta"):
        model = LoopedTransformer(config).to(dtype)
    return model if device == "meta" else model.to_empty(device=device)


_TABLE = "freqs_cis"


def _rotary_table(config: LoopedConfig) -> Tensor:
    """Return Huginn's stored table of cos and sin, ``(1, positions, 1, d/2, 2)``."""
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    angles = torch.outer(torch.arange(config.max_positions).float(), 1.0 / config.rope_theta**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]
