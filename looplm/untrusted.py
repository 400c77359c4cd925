"""What comes out of strangers' files (JSON, file names, plain data), checked before anything uses it.

Knows no models and no formats beyond JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from looplm.errors import InputError

__all__ = ["is_file_name", "is_plain", "parse_object", "read_object"]

_MOST_LEVELS = 32  # what reads deeper nesting may not be able to write it again


def is_plain(value: Any, levels: int = _MOST_LEVELS) -> bool:
    """Return whether a value is what JSON can hold, nested at most ``levels`` deep.

    Example:
        >>> is_plain({"a": [1, None]}), is_plain({"a": object()}), is_plain([[1]], levels=1)
        (True, False, False)
    """
    if value is None or isinstance(value, bool | int | float | str):
        return True
    if levels == 0:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part, levels - 1) for key, part in value.items())
    return isinstance(value, list) and all(is_plain(part, levels - 1) for part in value)


def is_file_name(name: Any) -> bool:
    """Return whether a name can be that of a file inside a directory, and of nothing outside it.

    Example:
        >>> [is_file_name(name) for name in ("a.json", "../a", "/a", "..", ".a", "a" * 300)]
        [True, False, False, False, False, False]
    """
    if not isinstance(name, str) or not name.isprintable() or name.startswith(".") or set(name) & set("/\\:"):
        return False
    return 0 < len(name.encode()) <= 255


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        InputError: If there is no such file, or for what :func:`parse_object` refuses.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = path.write_text('{"width": 16}')
        >>> read_object(path)
        {'width': 16}
    """
    try:
        content = path.read_bytes()
    except OSError:
        raise InputError(f"{str(path.parent)!r} has no readable {path.name}.") from None
    return parse_object(str(path), content)


def parse_object(where: str, content: bytes) -> dict[str, Any]:
    """Return the object of a JSON text in UTF-8, with a byte order mark or without.

    Args:
        where: What the message calls the place where it stands.
        content: The text.

    Raises:
        InputError: If it is no JSON, no object, or nested too deeply.

    Example:
        >>> parse_object("config.json", b'{"width": 16}')
        {'width': 16}
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise InputError(f"{where!r} must not be nested more than {_MOST_LEVELS} deep.") from None
    except ValueError as error:
        raise InputError(f"{where!r} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{where!r} must hold an object, got {type(value).__name__}.")
    if not is_plain(value):
        raise InputError(f"{where!r} must not be nested more than {_MOST_LEVELS} deep.")
    return value
