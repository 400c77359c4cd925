"""Config files as text, looked at before the parser, which does not say which of several is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from looplm.errors import InputError

__all__ = ["check_config_files"]


def _named(argv: Sequence[str]) -> Iterator[Path]:
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument == "--config":
            yield Path(following)
        elif argument.startswith("--config="):
            yield Path(argument.removeprefix("--config="))


def check_config_files(argv: Sequence[str]) -> None:
    """Refuse files after ``--config`` that are no YAML mapping; missing ones are the parser's to name.

    Raises:
        InputError: Names the file, and the line where there is one.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.yaml"
        >>> _ = path.write_text("model: {}")
        >>> check_config_files(["fit", "--config", str(path)])
    """
    for path in _named(argv):
        if not path.is_file():
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"config {str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
        except OSError as error:
            raise InputError(f"config {str(path)!r} cannot be read: {error.strerror}.") from None
        except yaml.MarkedYAMLError as error:
            where = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise InputError(f"config {str(path)!r}{where}: {error.problem or error.context}.") from None
        except yaml.YAMLError as error:
            raise InputError(f"config {str(path)!r} is no YAML: {error}") from None
        if not isinstance(content, dict):
            kind = "an empty file" if content is None else type(content).__name__
            raise InputError(f"config {str(path)!r} must be a YAML mapping, fields and their values, got {kind}.")
