"""What ``--ckpt_path`` names, looked at before anything is built: a whole checkpoint, of the kind that is needed."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

from looplm.commands.messages import nearest_path
from looplm.durable import is_sharded
from looplm.errors import InputError
from looplm.sharded_checkpoints import check_sharded

__all__ = ["check_checkpoint"]

# What Lightning needs to load the weights, and to go on training.
_LOADABLE = frozenset({"state_dict", "hyper_parameters", "pytorch-lightning_version"})
_RESUMABLE = _LOADABLE | {"optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step", "epoch"}


def check_checkpoint(path: Path, *, resumes: bool, may_be_sharded: bool) -> None:
    """Refuse what is no whole checkpoint.

    Args:
        path: A file, or the folder of a sharded checkpoint.
        resumes: Whether training is to go on from it, for which weights alone do not do.
        may_be_sharded: Whether the strategy reads shards.

    Raises:
        InputError: Says what is wrong with it.

    Example:
        >>> check_checkpoint(Path("no/such.ckpt"), resumes=False, may_be_sharded=False)
        Traceback (most recent call last):
            ...
        looplm.errors.InputError: `ckpt_path` must be a checkpoint file, got 'no/such.ckpt', which does not exist.
    """
    if is_sharded(path):
        if not may_be_sharded:
            raise InputError(
                f"`ckpt_path` {str(path)!r} is sharded, which only the strategy ShardedStrategy reads: "
                f"`python -m looplm consolidate {path} FILE` makes one file of it."
            )
        keys: Iterable[str] = check_sharded(path)
    else:
        keys = _read_keys(path)
    missing = sorted((_RESUMABLE if resumes else _LOADABLE) - set(keys))
    if missing:
        raise InputError(
            f"`ckpt_path` {str(path)!r} is no checkpoint of looplm, or not a whole one: it lacks {missing}."
        )


def _read_keys(path: Path) -> Iterable[str]:
    if (path / "checkpoint").is_dir() and (path / "latest").is_file():
        raise InputError(
            f"`ckpt_path` {str(path)!r} is a checkpoint of DeepSpeed: pickled code, which looplm does not run, so that "
            "its runs cannot go on; `conf/overlays/fsdp.yaml` shards and can. Of a run of your own Lightning's "
            "`convert_zero_checkpoint_to_fp32_state_dict` makes one file of weights."
        )
    if path.is_dir():
        raise InputError(f"`ckpt_path` must be a checkpoint file or a run directory with one, got {str(path)!r}.")
    if not path.is_file():
        hint = (nearest_path(path) if path.suffix or len(path.parts) > 1 else "") or "."
        raise InputError(f"`ckpt_path` must be a checkpoint file, got {str(path)!r}, which does not exist{hint}")
    try:
        # torch.load does not look at the checksums: without this, flipped bytes become weights.
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"`ckpt_path` {str(path)!r} cannot be read: damaged, or no checkpoint ({type(error).__name__})."
        ) from None
    return content if isinstance(content, dict) else ()
