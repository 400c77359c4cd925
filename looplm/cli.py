"""The command line: Lightning's subcommands on our classes, and our own subcommands.

Importing this file imports neither Lightning nor torch, so that help is fast.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import looplm
from looplm.commands.messages import nearest
from looplm.commands.names import LIGHTNING, OWN, module_of
from looplm.errors import InputError

__all__ = ["main"]

_EXAMPLES = """\
examples:
  python -m looplm fit --config conf/stars.yaml
  python -m looplm test --config conf/stars.yaml
  echo 123+456 | python -m looplm predict --config conf/stars.yaml --model.predict_depth=16
  python -m looplm compare runs/stars runs/fixed_depth
  python -m looplm explore runs/stars
  python -m looplm doctor
"""


def _help() -> str:
    width = max(map(len, [*LIGHTNING, *OWN]))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in {**LIGHTNING, **OWN}.items())
    return (
        f"usage: python -m looplm COMMAND [options]\n\n"
        f"looplm {looplm.__version__}: looped language models that hold their accuracy at any depth\n\n"
        f"commands (each has --help):\n{commands}\n\n{_EXAMPLES}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; None: those of this process.

    Returns:
        The exit code: 0, 2 after an error of the user's, which was printed in one line, or 130 after Ctrl-C.

    Example:
        >>> main(["--version"])
        looplm ...
        0
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help", "help"):
            sys.stdout.write(_help())
            return 0
        if args[0] == "--version":
            sys.stdout.write(f"looplm {looplm.__version__}\n")
            return 0
        command, rest = args[0], args[1:]
        if command in OWN:
            return int(importlib.import_module(module_of(command)).run(rest))
        if command in LIGHTNING:
            importlib.import_module("looplm.commands.lightning").run(args)
            return 0
        known = [*LIGHTNING, *OWN]
        hint = nearest(f"{command.lower()} ", known) or "."  # with a space: FIT is near fit, and not left out
        raise InputError(f"unknown command {command!r}: the commands are {', '.join(known)}{hint}")
    except InputError as error:
        sys.stderr.write(f"looplm: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("looplm: interrupted\n")
        return 130
