"""``import``: a Hugging Face directory (Ouro, Huginn, our own) becomes a checkpoint that test and predict can read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from looplm.checkpoints import from_pretrained, save_checkpoint
from looplm.commands.arguments import Parser
from looplm.commands.next_step import explore_model_line
from looplm.errors import InputError

__all__ = ["make_parser", "run"]

_EXAMPLES = """\
examples:
  python -m looplm import ByteDance/Ouro-1.4B ouro.ckpt
  python -m looplm import exported_model model.ckpt
"""


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("import", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("source", metavar="DIR", help="a directory with config.json and safetensors, or a hub id")
    parser.add_argument("output", type=Path, metavar="OUT", help="the checkpoint file to write")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``.

    Raises:
        InputError: If the directory is no model, or the file is there already.
    """
    args = make_parser().parse_args(argv)
    if os.path.exists(args.output):
        raise InputError(f"{str(args.output)!r} exists already.")
    model = from_pretrained(args.source)
    save_checkpoint(model, args.output)
    has_tokenizer = model.origin is not None and "tokenizer.json" in model.origin.files
    line = explore_model_line(args.output, has_tokenizer=has_tokenizer)
    sys.stdout.write(f"written: {args.output}\n{line}\n")
    return 0
