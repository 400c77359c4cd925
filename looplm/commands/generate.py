"""``generate``: write a corpus of grade-school word problems with worked solutions, as JSON lines."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from looplm.callbacks.output import replace_file
from looplm.commands.arguments import Parser
from looplm.commands.next_step import command_line
from looplm.corpora.word_problems import MAX_STEPS, SPLITS, WordProblem, word_problems
from looplm.errors import InputError

__all__ = ["encode_rows", "make_parser", "run"]

_EXAMPLES = """\
examples:
  python -m looplm generate train.jsonl.gz --num_rows 50000
  python -m looplm generate test.jsonl --split test --num_rows 500 --max_steps 3
"""


def encode_rows(problems: Iterable[WordProblem], *, is_compressed: bool) -> bytes:
    """Return problems as JSON lines with ``question``, ``answer``, ``final``, ``steps``; the same bytes every time.

    Example:
        >>> json.loads(encode_rows(word_problems(0, "train", 1), is_compressed=False))["final"]
        '57'
    """
    lines = "".join(json.dumps(problem.row()) + "\n" for problem in problems).encode()
    if not is_compressed:
        return lines
    content = io.BytesIO()
    # Neither name nor time of writing belong to the content.
    with gzip.GzipFile(filename="", mode="wb", fileobj=content, mtime=0, compresslevel=9) as file:
        file.write(lines)
    return content.getvalue()


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("generate", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("output", type=Path, metavar="OUT", help="file to write: .jsonl or .jsonl.gz")
    parser.add_argument("--split", choices=SPLITS, default="train", help="disjoint by construction, whatever the seeds")
    parser.add_argument("--num_rows", type=int, default=1000, metavar="N", help="problems, all different")
    parser.add_argument("--seed", type=int, default=0, help="a longer file of a seed begins with a shorter one")
    parser.add_argument("--min_steps", type=int, default=1, metavar="N", help="fewest steps of a solution")
    parser.add_argument("--max_steps", type=int, default=MAX_STEPS, metavar="N", help=f"most steps, up to {MAX_STEPS}")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.num_rows < 1:
        parser.error(f"`--num_rows` must be >= 1, got {args.num_rows}")
    if not args.output.name.endswith((".jsonl", ".jsonl.gz")):
        parser.error(f"`OUT` must end in .jsonl or .jsonl.gz, got {str(args.output)!r}")
    try:
        problems = word_problems(
            args.seed, args.split, args.num_rows, min_steps=args.min_steps, max_steps=args.max_steps
        )
        replace_file(args.output, encode_rows(problems, is_compressed=args.output.suffix == ".gz"))
    except OSError as error:
        raise InputError(f"`OUT` {str(args.output)!r} cannot be written: {error.strerror}.") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    train = json.dumps([{"path": str(args.output)}])
    line = command_line("fit", "--config", "conf/math.yaml", f"--data.init_args.train={train}")
    sys.stdout.write(f"written: {args.num_rows} problems to {args.output}\nnext:    {line}\n")
    return 0
