"""``export``: a checkpoint becomes a Hugging Face directory, under original names where it is an Ouro or a Huginn."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from looplm.checkpoints import load_checkpoint, save_pretrained
from looplm.commands.arguments import Parser
from looplm.commands.messages import nearest_path
from looplm.commands.next_step import command_line, explore_model_line, last_of_run, run_config
from looplm.errors import InputError
from looplm.pretrained_folder import read_origin

__all__ = ["make_parser", "run"]

_EXAMPLES = """\
examples:
  python -m looplm export runs/stars stars_hf --num_loops 16
  python -m looplm export ouro.ckpt ouro_tuned --like ByteDance-Ouro-1.4B --dtype bfloat16
"""

_DTYPES = ("float32", "bfloat16", "float16")


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("export", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint, or a run directory")
    parser.add_argument("output", type=Path, metavar="OUT", help="a directory that does not exist yet, or is empty")
    parser.add_argument(
        "--like", type=Path, metavar="DIR", help="take config fields and tokenizer from this directory, the original's"
    )
    parser.add_argument("--num_loops", type=int, metavar="N", help="the usual number of loops that config.json names")
    parser.add_argument("--dtype", choices=_DTYPES, help="type of the weights; default: that of the checkpoint")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``.

    Raises:
        InputError: If there is no such checkpoint, or the directory cannot be written.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.num_loops is not None and args.num_loops < 1:
        parser.error(f"`--num_loops` must be >= 1, got {args.num_loops}")
    origin = None if args.like is None else read_origin(args.like)
    checkpoint = last_of_run(args.checkpoint)
    if not os.path.exists(checkpoint):
        raise InputError(f"checkpoint {str(checkpoint)!r} does not exist{nearest_path(checkpoint) or '.'}")
    model = load_checkpoint(checkpoint)
    if args.dtype is not None:
        model.to(getattr(torch, args.dtype))
    save_pretrained(model, args.output, origin=origin, num_loops=args.num_loops)
    if (args.output / "tokenizer.json").is_file():
        model_args = f"pretrained={args.output},num_loops={args.num_loops or 8}"
        evaluate = command_line("eval", "--model", "looplm", "--model_args", model_args, "--tasks", "gsm8k")
        line = f"next:    {evaluate}"
    else:  # the harness has no texts for it
        line = explore_model_line(args.output, has_tokenizer=False, config=run_config(checkpoint))
    sys.stdout.write(f"written: {args.output}\n{line}\n")
    return 0
