"""The parser of our own subcommands: errors are those of the user, in one line. Knows no subcommand."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from looplm.commands.messages import nearest
from looplm.errors import InputError

__all__ = ["Parser"]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Texts as they are written, and the default of every option that has one and does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        is_plain = isinstance(action.default, str | int | float | Path) and not isinstance(action.default, bool)
        is_told = "default" in said or action.default == argparse.SUPPRESS or not action.option_strings
        return said if is_told or not is_plain else f"{said} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises InputError, takes no abbreviated options and prints its texts as they are written.

    Args:
        command: Name of the subcommand.
        description: What it does.
        epilog: Examples, below the options.
    """

    def __init__(self, command: str, *, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"python -m looplm {command}",
            description=None if description is None else description.replace("``", "`"),
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise in place of printing the usage and leaving.

        Raises:
            InputError: Always.
        """
        unknown = re.match(r"unrecognized arguments: (--[\w.-]+)", message)
        # The parser's own choices, and those that a command's message names.
        value = re.search(r"choice: '(?P<got>.*)' \(choose from (?P<known>.*)\)", message) or re.search(
            r"must be (?P<known>.*), got '(?P<got>.*)'", message
        )
        if unknown:
            message = f"unknown option {unknown[1]}{nearest(unknown[1], self._option_string_actions)}"
        elif value:
            known = re.findall(r"[`']([^`']+)[`']", value["known"]) or re.split(r",\s*", value["known"])
            message = f"{message.rstrip('.')}{nearest(value['got'], known)}"
        raise InputError(f"{message} (see `{self.prog} --help`).")
