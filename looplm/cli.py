"""The command line: Lightning's subcommands on our classes, and our own subcommands.

Importing this file imports neither Lightning nor torch, so that help is fast.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import looplm
from looplm.errors import InputError

__all__ = ["main"]

_LIGHTNING = {
    "fit": "train a model",
    "validate": "accuracy by depth on the validation set",
    "test": "accuracy by depth on the test set",
    "predict": "answer problems from a file or standard input",
}
_OWN = {
    "import": "a Hugging Face directory (Ouro, Huginn, our own) becomes a checkpoint",
    "export": "a checkpoint becomes a Hugging Face directory",
    "generate": "write a corpus of word problems with worked solutions",
    "consolidate": "a sharded checkpoint becomes one file",
    "exits": "accuracy by loops of every exit and by memory of every cache",
    "eval": "run tasks of lm-evaluation-harness at any depth",
    "compare": "curves of several runs in one table and one picture",
    "sweep": "fit, test and compare several configs; finished runs are kept",
}

_EXAMPLES = """\
examples:
  python -m looplm fit --config conf/stars.yaml
  python -m looplm test --config conf/stars.yaml
  echo 123+456 | python -m looplm predict --config conf/stars.yaml --model.predict_depth=16
  python -m looplm compare runs/stars runs/fixed_depth
"""


def _help() -> str:
    width = max(map(len, [*_LIGHTNING, *_OWN]))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in {**_LIGHTNING, **_OWN}.items())
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
        The exit code: 0, or 2 after an error of the user's, which was printed in one line.

    Example:
        >>> main(["--version"])
        looplm ...
        0
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help"):
            sys.stdout.write(_help())
            return 0
        if args[0] == "--version":
            sys.stdout.write(f"looplm {looplm.__version__}\n")
            return 0
        command, rest = args[0], args[1:]
        if command in _OWN:
            file = "import_" if command == "import" else command  # `import` is no name for a module
            module = importlib.import_module(f"looplm.commands.{file}")
            return int(module.run(rest))
        if command in _LIGHTNING:
            importlib.import_module("looplm.commands.lightning").run(args)
            return 0
        raise InputError(f"unknown command {command!r}; commands are {', '.join([*_LIGHTNING, *_OWN])}.")
    except InputError as error:
        sys.stderr.write(f"looplm: error: {' '.join(str(error).split())}\n")
        return 2
