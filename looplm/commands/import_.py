"""``import``: a Hugging Face directory (Ouro, Huginn, our own) becomes a checkpoint that test and predict can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from looplm.checkpoints import from_pretrained, save_checkpoint
from looplm.commands.arguments import Parser

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    parser = Parser("import", description=__doc__)
    parser.add_argument("source", metavar="DIR", help="a directory with config.json and safetensors, or a hub id")
    parser.add_argument("output", type=Path, metavar="OUT", help="the checkpoint file to write")
    args = parser.parse_args(argv)
    save_checkpoint(from_pretrained(args.source), args.output)
    return 0
