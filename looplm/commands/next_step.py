"""What a command says at its end: the next one to type. Knows paths and names; runs nothing."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from looplm.durable import recover

__all__ = ["command_line", "explore_line", "explore_model_line", "last_of_run", "run_config"]


def command_line(*arguments: object) -> str:
    """Return a command of ours as it can be pasted into a shell.

    Example:
        >>> command_line("test", "--config", "my runs/config.yaml")
        "python -m looplm test --config 'my runs/config.yaml'"
    """
    return shlex.join(["python", "-m", "looplm", *map(str, arguments)])


def run_config(checkpoint: Path) -> Path | None:
    """Return the ``config.yaml`` of the run that a checkpoint is of; None where it is of none.

    Example:
        >>> run_config(Path("no/such/run/checkpoints/last.ckpt")) is None
        True
    """
    folder = (checkpoint if len(checkpoint.parts) > 2 else checkpoint.resolve()).parent.parent
    return folder / "config.yaml" if (folder / "config.yaml").is_file() else None


def last_of_run(path: Path) -> Path:
    """Return the last checkpoint of a run directory; any other path is returned as it is.

    What a killed run has put aside is brought back first, for whoever reads the checkpoint.

    Example:
        >>> last_of_run(Path("no/such.ckpt"))
        PosixPath('no/such.ckpt')
    """
    last = path / "checkpoints" / "last.ckpt"
    for checkpoint in (path, last):
        recover(checkpoint)
    return last if os.path.exists(last) else path  # where pathlib raises over a long name


def explore_model_line(model: Path, *, has_tokenizer: bool, config: Path | None = None) -> str:
    """Return the line that opens a model: without a tokenizer only its run's config says how problems are written.

    Example:
        >>> explore_model_line(Path("sums.ckpt"), has_tokenizer=False)
        'next:    python -m looplm explore sums.ckpt --config CONFIG (the config.yaml of the run that trained it)'
    """
    if has_tokenizer:
        return f"next:    {command_line('explore', model)}"
    line = f"next:    {command_line('explore', model, '--config', config or 'CONFIG')}"
    return line if config else f"{line} (the config.yaml of the run that trained it)"


def explore_line(directories: Iterable[Path]) -> str:
    """Return the line that opens the first of some run directories that holds a checkpoint; nothing if none does.

    Example:
        >>> explore_line([Path("no/such/run")])
        ''
    """
    for directory in directories:
        if (directory / "checkpoints" / "last.ckpt").exists():
            return f"next:    {command_line('explore', directory)}\n"
    return ""
