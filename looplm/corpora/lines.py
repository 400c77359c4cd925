"""Lines of a text file or of standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from looplm.errors import InputError

__all__ = ["input_lines", "input_name"]


def input_name(path: str) -> str:
    """Return what messages call an input.

    Example:
        >>> input_name("-")
        'standard input'
    """
    return "standard input" if path == "-" else path


def input_lines(path: str) -> list[str]:
    r"""Return the lines of an input, without their ends.

    Args:
        path: A file; ``-``: standard input.

    Raises:
        InputError: If it cannot be read, or is no UTF-8 text.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "problems"
        >>> _ = path.write_text("1+2\n3+4\n")
        >>> input_lines(str(path))
        ['1+2', '3+4']
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{input_name(path)} cannot be read: {error}.") from error
    # Not `splitlines`, which also splits at line separators inside a text.
    return text.removesuffix("\n").split("\n") if text else []
