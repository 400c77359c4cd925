"""``completion``: a script for bash or zsh that completes commands, options and values (needs ``looplm[completion]``).

It completes both ``looplm …`` and ``python -m looplm …``. Making it takes some seconds, using it none: it holds all
names.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from lightning_utilities.core.imports import RequirementCache

from looplm.commands.arguments import Parser
from looplm.commands.names import LIGHTNING, OWN, module_of
from looplm.errors import InputError

__all__ = ["make_parser", "run"]

_SHELLS = ("bash", "zsh")

_EXAMPLES = """\
examples, once:
  python -m looplm completion bash > ~/.looplm.bash && echo 'source ~/.looplm.bash' >> ~/.bashrc
  python -m looplm completion zsh > ~/.looplm.zsh && echo 'eval "$(<~/.looplm.zsh)"' >> ~/.zshrc  # after compinit
"""

# Shells complete by a command's first word. `python -m looplm fit` is shown to the function as `looplm fit`; any other
# call of python completes file names, as without us.
_PYTHON = {
    "bash": """
_looplm_python() {
  if [[ "${COMP_WORDS[1]}" == -m && "${COMP_WORDS[2]}" == looplm && $COMP_CWORD -gt 2 ]]; then
    local COMP_WORDS=(looplm "${COMP_WORDS[@]:3}") COMP_CWORD=$((COMP_CWORD - 2))
    _shtab_looplm
  else
    COMPREPLY=()
  fi
}
complete -o bashdefault -o default -F _looplm_python python python3
""",
    "zsh": """
_looplm_python() {
  if [[ "$words[2]" == -m && "$words[3]" == looplm && $CURRENT -gt 3 ]]; then
    shift 2 words
    words[1]=looplm
    (( CURRENT -= 2 ))
    _shtab_looplm
  else
    _default
  fi
}
compdef _looplm_python python python3
""",
}


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("completion", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("shell", choices=_SHELLS, help="the shell that reads it")
    return parser


def _lightning_parsers(shell: str, preambles: list[str]) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of Lightning's subcommands, their actions knowing how values are completed."""
    from jsonargparse import capture_parser

    from looplm.commands.lightning import run as run_lightning

    parser: Any = capture_parser(run_lightning, ["fit"])
    # Called for what it does to the actions and adds to the preambles; the script itself lacks our own commands.
    parser.get_completion_script(f"shtab-{shell}", preambles=preambles)
    return dict(parser._subcommands_action._name_parser_map)


def _own_parser(command: str) -> argparse.ArgumentParser | None:
    """Return the parser of one of our commands; `eval` has none of its own."""
    make = getattr(importlib.import_module(module_of(command)), "make_parser", None)
    return None if make is None else make()


def _make_script(shell: str) -> str:
    """Return the script.

    Args:
        shell: ``bash`` or ``zsh``.

    Raises:
        InputError: If shtab is not installed.
    """
    if not RequirementCache("shtab>=1.7"):
        raise InputError("`completion` needs shtab>=1.7: pip install 'looplm[completion]'.")
    import shtab

    preambles = ["# looplm"]  # jsonargparse adds to a list that is not empty
    lightning = _lightning_parsers(shell, preambles)
    root = argparse.ArgumentParser(prog="looplm", description="looped language models")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers(dest="command")
    for command, text in {**LIGHTNING, **OWN}.items():
        source = lightning.get(command) or _own_parser(command)
        parents = [] if source is None else [source]
        made = commands.add_parser(command, help=text, parents=parents, add_help=source is None)
        # What LightningCLI computes from another option is no option: zsh stumbles over its name, "a --> b".
        made._actions[:] = [action for action in made._actions if "-->" not in f"{action.option_strings} {action.dest}"]
        for action in made._actions:
            _complete_files(action, shtab.FILE)
    return shtab.complete(root, shell, preamble="\n".join(preambles)) + "\n" + _PYTHON[shell]


def _complete_files(action: argparse.Action, files: Any) -> None:
    """Let what names a file or folder complete as one."""
    is_path = getattr(action.type, "__name__", "") == "Path" or action.dest in ("source", "ckpt_path")
    if is_path and action.choices is None:
        action.complete = files  # type: ignore[attr-defined]


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    args = make_parser().parse_args(argv)
    sys.stdout.write(_make_script(args.shell))
    return 0
