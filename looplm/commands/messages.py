"""What the argument parser says of a wrong value, in one line, with the nearest valid name.

Knows the parser's wording and the names of files, and nothing else.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["condense", "nearest", "nearest_path"]

_KEY = re.compile(r'Parser key "([^"]+)":')
_BULLET = re.compile(r"^\s*- (.*)$", re.MULTILINE)
# Alternatives of a type that the user did not mean: every field may also be a file, or nothing.
_NOISE = re.compile(r"Expected a path but |Expected a <class 'NoneType'>|Does not validate against any of the Union")
_EXPECTED = re.compile(r"Expected a <class '([\w.]+)'>\. Got value: (.*)", re.DOTALL)
_CHOICE = re.compile(r"Expected a typing\.Literal\[(.*?)\]|Expected a <class '([\w.]+)'>$")
_GIVEN = re.compile(r"(?:Got|Given) value: (.*)\s*\Z")
_NAME = re.compile(r"Expected a dot import path string: (\S+)")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_FILE = re.compile(r"File does not exist: '(.+)'")
_REQUIREMENT = re.compile(r"class_path '(?:\w+\.)*(\w+)':\s+(Requirement .*)")
_KIND = re.compile(r"Expected a <class '([\w.]+)'>")
_OBJECT = re.compile(r"<(?:\w+\.)*(\w+) object at 0x\w+>")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: --([\w.]+)")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with the known word that is most like this one, or nothing.

    Example:
        >>> nearest("widht", ["depth", "width"])
        '; did you mean width?'
    """
    found = difflib.get_close_matches(word, sorted(set(known) - {word}), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def nearest_path(path: Path) -> str:
    """Return ``; did you mean …?`` with the path that is there and most like a missing one, or nothing.

    Its first folder that is missing is compared with those beside it, endings left out.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "conf").mkdir()
        >>> (folder / "conf" / "stars.yaml").touch()
        >>> nearest_path(folder / "conf" / "star.yml") == f"; did you mean {folder / 'conf' / 'stars.yaml'}?"
        True
        >>> nearest_path(folder / "config" / "stars.yaml") == f"; did you mean {folder / 'conf' / 'stars.yaml'}?"
        True
        >>> nearest_path(folder / "conf" / "thesis.txt")
        ''
    """
    missing = next((part for part in [*reversed(path.parents), path] if not os.path.exists(part)), None)
    if missing is None:
        return ""
    try:
        beside = {entry.stem: entry for entry in sorted(missing.parent.iterdir(), reverse=True)}
    except (OSError, ValueError):
        return ""
    stems = difflib.get_close_matches(missing.stem, beside, n=1, cutoff=0.6)
    if not stems:
        return ""
    found = beside[stems[0]]
    whole = found / path.relative_to(missing)
    return f"; did you mean {whole if whole.exists() else found}?"


def condense(message: str, options: Iterable[str] = (), names: Iterable[str] = ()) -> str:
    r"""Return a message of the parser without what a user cannot use.

    Args:
        message: The parser's.
        options: Names of all options, without dashes.
        names: Names of classes that a config can name.

    Example:
        >>> condense("Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: x")
        '`a.b` must be int, got x'
    """
    message = _OBJECT.sub(r"\1", message)
    found = _UNRECOGNIZED.match(message)
    if found:
        return f"unknown option --{found[1]}{nearest(f'--{found[1]}', (f'--{option}' for option in options))}"
    keys = list(dict.fromkeys(_KEY.findall(message)))
    bullets = [bullet.strip() for bullet in _BULLET.findall(message) if not _NOISE.match(bullet.strip())]
    if not bullets:
        # No alternatives, or only those that are no help: the words after the last key.
        bullets = [_KEY.split(message)[-1].strip()] if not _BULLET.search(message) else []
    kinds = [found[1] for bullet in bullets if (found := _KIND.fullmatch(bullet))]
    given = _GIVEN.search(message)
    if found := _REQUIREMENT.search(message):
        reasons = [f"{found[1]} cannot be made: {found[2]}"]
    elif any(bullet.startswith("Expected a typing.Literal") for bullet in bullets):
        reasons = [_choices(bullets, message)]
    elif kinds and given and any(_NAME.fullmatch(bullet) for bullet in bullets):
        # A number, or an object that nobody meant.
        reasons = [f"must be {' or '.join(kinds)}, got {given[1]}"]
    else:
        reasons = [_reason(bullet, options, names) for bullet in dict.fromkeys(bullets)]
    if not reasons:
        return message
    where = ".".join(keys)
    separator = " " if reasons[0].startswith("must ") else ": "
    return f"`{where}`{separator}{'; '.join(reasons)}" if where else "; ".join(reasons)


def _choices(bullets: list[str], message: str) -> str:
    """Return what a value must be that is one of some names, or else of some type."""
    found = [choice for bullet in bullets for choice in _CHOICE.findall(bullet)]
    known = [name.strip("'") for names, kind in found for name in (names.split(", ") if names else [kind])]
    given = _GIVEN.search(message)
    got = f", got {given[1]}{nearest(given[1], known)}" if given else ""
    return f"must be one of {', '.join(known)}{got}"


def _reason(bullet: str, options: Iterable[str], names: Iterable[str]) -> str:
    if found := _EXPECTED.fullmatch(bullet):
        return f"must be {found[1]}, got {found[2]}"
    if found := _NAME.fullmatch(bullet):
        return f"must name a class, got {found[1]}{nearest(found[1], names)}"
    if found := _FILE.fullmatch(bullet):
        path = Path(found[1])  # which the parser has made absolute
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return f"file {str(path)!r} does not exist{nearest_path(path)}"
    if found := _OPTION.search(bullet):
        endings = [option.rsplit(".", 1)[-1] for option in options]
        return f"unknown field {found[1]}{nearest(found[1], endings)}"
    return bullet
