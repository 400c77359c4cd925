"""Hugging Face directories in and out (Ouro, Huginn, our own), and checkpoints of training runs.

Knows files and models; the foreign names stand in :mod:`looplm.families`, what a directory holds beside weights in
:mod:`looplm.pretrained_folder`. Nothing here trains or decodes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import looplm
from looplm.config import LoopedConfig
from looplm.durable import is_sharded, recover, save_whole
from looplm.errors import InputError, reason
from looplm.families.family import Family, ForeignTensor, Part
from looplm.families.known import family_named, family_of
from looplm.families.rotary_table import ROTARY_TABLE, is_rotary_table, rotary_table, rotary_table_shape
from looplm.model import LoopedTransformer
from looplm.origin import Origin, pack_origin, unpack_origin
from looplm.pretrained_folder import local_folder, origin_of, weights_dtype
from looplm.shards import Shards, check_shapes, write_shards
from looplm.untrusted import read_object

__all__ = [
    "from_pretrained",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
    "save_pretrained",
]

_OWN_TYPE = "looplm"


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoopedTransformer:
    """Return the model of a checkpoint file or of a Hugging Face directory or hub id, in evaluation mode.

    Args:
        source: What :func:`load_checkpoint` or :func:`from_pretrained` takes.
        dtype: Type of the weights; None: that of the files.
        device: Where the weights go.

    Raises:
        InputError: See there.

    Example:
        >>> model = load_model("ByteDance/Ouro-1.4B", device="cuda")  # doctest: +SKIP
    """
    recover(Path(source))
    _refuse_sharded(source)
    if not os.path.isfile(source):
        return from_pretrained(source, dtype=dtype, device=device)
    model = load_checkpoint(source)
    for parameter in model.parameters():
        # Out of the mapped file: training may write a new checkpoint in its place.
        parameter.data = parameter.data.to(device, dtype or parameter.dtype, copy=True)
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
    fields = read_object(folder / "config.json")
    family, config = _read_config(fields)
    shards = Shards(folder)
    _check_num_layers(repr(str(folder)), config, len(shards.shapes))
    tensors = _tensors(family, config)
    optional = {ROTARY_TABLE: rotary_table_shape(config)} if _has_table(family) else {}
    check_shapes(repr(str(folder)), {tensor.name: tensor.shape for tensor in tensors}, shards.shapes, optional)
    if ROTARY_TABLE in shards.shapes and not is_rotary_table(shards.read(ROTARY_TABLE), config):
        raise InputError(f"{str(folder)!r}: {ROTARY_TABLE!r} is not the table of `rope_base` {config.rope_theta:g}.")
    dtype = weights_dtype(shards) if dtype is None else dtype
    model = _empty_model(config, dtype, device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in tensors:
            row = 0
            for part in tensor.parts:
                target = parameters[part.name].data[part.start : part.stop]
                shards.copy_rows(tensor.name, row, target)
                row += target.numel() // max(int(torch.Size(tensor.shape[1:]).numel()), 1)
    model.origin = origin_of(folder, fields, shards)
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
        InputError: If the directory cannot be written, or is the current one, or an Ouro or Huginn has neither
            ``num_loops`` nor an origin.

    Example:
        >>> import tempfile
        >>> config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32)
        >>> folder = Path(tempfile.mkdtemp()) / "model"
        >>> save_pretrained(LoopedTransformer(config), folder, num_loops=4)
        >>> from_pretrained(folder).config == config
        True
    """
    origin = model.origin if origin is None else origin
    family = family_of(model.config)
    tensors = _tensors(family, model.config)
    fields = _fields(model, family, origin, num_loops)
    target = Path(os.path.realpath(folder)) if "\0" not in os.fspath(folder) else Path(folder)
    if os.path.isfile(target) or (os.path.isdir(target) and any(target.iterdir())):
        raise InputError(f"the output must be a new or empty directory, got {str(folder)!r}.")
    if os.path.isdir(target) and os.path.samefile(target, os.curdir):
        # It is replaced as a whole: whoever stands in it would stand in a directory that is gone.
        raise InputError(f"the output must not be the current directory, got {str(folder)!r}.")
    weights = model.state_dict()
    table = _table(model.config, origin) if _has_table(family) else {}
    itemsize = {name: tensor.element_size() for name, tensor in weights.items()}
    sizes = {t.name: int(torch.Size(t.shape).numel()) * itemsize[t.parts[0].name] for t in tensors}
    sizes |= {name: tensor.nbytes for name, tensor in table.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(folder)!r} must be a directory that can be written: {reason(error)}.") from None
    try:
        write_shards(draft, sizes, _foreign(tensors, weights, table), max_shard_bytes)
        (draft / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        for name, content in (origin.files if origin is not None else {}).items():
            (draft / name).write_bytes(content)
        draft.chmod(0o755)
        draft.replace(target)
    except OSError as error:
        raise InputError(f"{str(folder)!r} could not be written: {reason(error)}.") from None
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
    if same and origin is not None and origin.dtype == dtype:
        return fields  # whatever the original says of the type, or does not say, is as true as it was
    keys = {"dtype", "torch_dtype"} & fields.keys() or {"torch_dtype"}
    return {**fields, **dict.fromkeys(sorted(keys), dtype)}


def save_checkpoint(model: LoopedTransformer, path: str | os.PathLike[str]) -> None:
    """Write a model as a checkpoint of :class:`~looplm.module.LoopLM`, which ``test`` and ``predict`` can read.

    Raises:
        InputError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32)
        >>> path = Path(tempfile.mkdtemp()) / "model.ckpt"
        >>> save_checkpoint(LoopedTransformer(config), path)
        >>> load_checkpoint(path).config == config
        True
    """
    content: dict[str, Any] = {
        **pack_origin(model.origin),
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {"config": model.config.to_dict()},
        "pytorch-lightning_version": version("lightning"),
        "epoch": 0,
        "global_step": 0,
    }
    save_whole(content, Path(path))


def _refuse_sharded(path: str | os.PathLike[str]) -> None:
    if is_sharded(Path(path)):
        name = os.fspath(path)
        raise InputError(f"{name!r} is sharded: `python -m looplm consolidate {name} FILE` makes one file.")


def load_checkpoint(path: str | os.PathLike[str]) -> LoopedTransformer:
    """Return the model of a checkpoint that training or :func:`save_checkpoint` wrote, in evaluation mode.

    Raises:
        InputError: If the file is missing, damaged, or no checkpoint of looplm.

    Example:
        >>> model = load_checkpoint("runs/stars/checkpoints/last.ckpt")  # doctest: +SKIP
    """
    where = repr(os.fspath(path))
    recover(Path(path))
    _refuse_sharded(path)
    if not os.path.isfile(path):
        raise InputError(f"the checkpoint must be a file, got {where}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds; what torch says there is advice to programmers
        raise InputError(
            f"{where} is no checkpoint of looplm, or damaged: it cannot be read as tensors and plain data "
            f"({type(error).__name__})."
        ) from None
    try:
        config = LoopedConfig.from_dict(content["hyper_parameters"]["config"])
        prefix = "model."
        weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        _check_num_layers(where, config, len(shapes))
        model = _empty_model(config, next(iter(weights.values())).dtype, "meta")
        check_shapes(where, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, shapes)
        model.load_state_dict(weights, assign=True)
        model.origin = unpack_origin(content)
    except InputError as error:
        raise InputError(f"{where}: {error}" if where not in str(error) else str(error)) from None
    except Exception as error:
        why = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{where} is no checkpoint of looplm, or damaged ({why:.200}).") from None
    return model.eval()


def _read_config(fields: dict[str, Any]) -> tuple[Family | None, LoopedConfig]:
    if fields.get("model_type") != _OWN_TYPE:
        family = family_named(fields.get("model_type"))
        return family, family.read_config(fields)
    architecture = fields.get("architecture")
    if not isinstance(architecture, dict):
        raise InputError(f"config.json: `architecture` must be an object, got {architecture!r:.200}.")
    try:
        return None, LoopedConfig.from_dict(architecture)
    except ValueError as error:
        raise InputError(f"config.json: `architecture`: {error!s:.500}") from None


def _check_num_layers(where: str, config: LoopedConfig, num_tensors: int) -> None:
    # Before anything is built: a wrong number may be huge.
    num_layers = config.num_prelude_layers + config.num_core_layers + config.num_coda_layers
    if num_layers > num_tensors:
        raise InputError(f"{where}: the architecture has {num_layers} layers, the weights {num_tensors} tensors.")


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


def _has_table(family: Family | None) -> bool:
    """Return whether directories of a family may hold Huginn's table of cos and sin."""
    return family is not None and family.model_type == "huginn_raven"


def _table(config: LoopedConfig, origin: Origin | None) -> dict[str, Tensor]:
    """Return the table to store: the origin's as it was, or none where it had none."""
    if origin is None or origin.buffers is None or origin.config.get("model_type") != "huginn_raven":
        return {ROTARY_TABLE: rotary_table(config)}
    stored = origin.buffers.get(ROTARY_TABLE)
    if stored is None:
        return {}
    return {ROTARY_TABLE: stored if is_rotary_table(stored, config) else rotary_table(config)}
