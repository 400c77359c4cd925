"""What a command says at its end: the next one to type. Knows paths and names; runs nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

__all__ = ["command_line", "explore_line"]


def command_line(*arguments: object) -> str:
    """Return a command of ours as it can be pasted into a shell.

    Example:
        >>> command_line("test", "--config", "my runs/config.yaml")
        "python -m looplm test --config 'my runs/config.yaml'"
    """
    return shlex.join(["python", "-m", "looplm", *map(str, arguments)])


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
