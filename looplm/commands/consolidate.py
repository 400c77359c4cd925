"""``consolidate``: the folder of a sharded checkpoint becomes one file, which a single process reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from looplm.commands.arguments import Parser
from looplm.commands.next_step import command_line, run_config
from looplm.durable import save_whole
from looplm.errors import InputError
from looplm.sharded_checkpoints import read_sharded

__all__ = ["make_parser", "run"]

_EXAMPLES = """\
example:
  python -m looplm consolidate runs/large/checkpoints/last.ckpt large.ckpt
"""


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("consolidate", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="a checkpoint that FSDP wrote in shards")
    parser.add_argument("output", type=Path, metavar="CKPT", help="a file that does not exist yet")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    args = make_parser().parse_args(argv)
    if args.output.exists():
        raise InputError(f"the output must be a new file, got {str(args.output)!r}.")
    content = read_sharded(args.checkpoint)
    save_whole(content, args.output)
    config = run_config(args.checkpoint) or "CONFIG"
    line = command_line("test", "--config", config, "--ckpt_path", args.output)
    sys.stdout.write(f"written: {args.output}\nnext:    {line}\n")
    return 0
