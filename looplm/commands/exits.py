"""``exits``: accuracy by mean loops of every exit rule, and by memory of every cache policy, on an arithmetic run.

Thresholds are chosen on problems of the training stream and judged on the test set.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from looplm.cache import kept_loops
from looplm.callbacks.output import write_figure
from looplm.checkpoints import load_checkpoint
from looplm.commands.arguments import Parser
from looplm.commands.exit_table import NamedExit, exits_of
from looplm.commands.next_step import command_line
from looplm.commands.run_data import read_run_data
from looplm.generation import GenerationOptions, generate_with_loops
from looplm.group_figures import numbered_points
from looplm.model import LoopedTransformer

__all__ = ["ExitRow", "Problems", "choose", "equal_depth", "make_parser", "run"]

_EXAMPLES = """\
examples:
  python -m looplm exits runs/stars
  python -m looplm exits runs/stars --num_loops 32 --most_lost 0.005
  python -m looplm exits runs/stars_plus --cache last
"""


@dataclass(frozen=True, kw_only=True)
class ExitRow:
    """One measurement; a row of ``exits.csv``.

    Example:
        >>> measured = {"exact_match": 0.98, "mean_loops": 3.0, "cache_bytes": 4096}
        >>> row = ExitRow(split="test", rule="kl", threshold=0.1, cache="per_loop", **measured)
        >>> f"{1 - row.mean_loops / 8:.1%} of 8 loops are saved"
        '62.5% of 8 loops are saved'
    """

    split: str
    """``train`` (where thresholds are chosen) or ``test``."""
    rule: str
    """``fixed``, ``residual``, ``kl``, ``entropy``, ``confidence`` or ``gate``."""
    threshold: float
    """The rule's number; of ``fixed`` the depth."""
    cache: str
    """Policy of the cache."""
    exact_match: float
    """Share of whole answers that are right."""
    mean_loops: float
    """Mean loops of a generated token."""
    cache_bytes: int
    """Memory of keys and values for the whole batch."""


@dataclass(frozen=True)
class Problems:
    """Prompts padded on the left and their answers, the end mark included, padded with −100.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 7, 1]])}
        >>> problems = Problems.of(batch, end_id=1)
        >>> problems.tokens.tolist(), problems.answers.tolist()
        ([[5, 6]], [[7, 1]])
    """

    tokens: Tensor
    mask: Tensor
    answers: Tensor
    end_id: int

    @classmethod
    def of(cls, batch: dict[str, Any], end_id: int) -> Problems:
        """Cut teacher-forced rows, ``input_ids`` and ``labels`` ``(B, T)``, into prompts and answers."""
        tokens, labels = batch["input_ids"], batch["labels"]
        first = (labels != -100).int().argmax(1)
        lengths = first + 1  # the last token of a prompt is where the first label stands
        columns = torch.arange(int(lengths.max())) - (lengths.max() - lengths)[:, None]
        longest = int((labels != -100).sum(1).max())
        places = first[:, None] + torch.arange(longest)
        answers = labels.gather(1, places.clamp(max=labels.shape[1] - 1))
        answers = answers.masked_fill(places >= labels.shape[1], -100)
        return cls(tokens.gather(1, columns.clamp(min=0)), (columns >= 0).long(), answers, end_id)


def _measure(
    model: LoopedTransformer,
    problems: Problems,
    *,
    split: str,
    num_loops: int,
    cache: str,
    known: NamedExit | None = None,
    threshold: float = 0.0,
) -> ExitRow:
    """Answer all problems as one batch and count."""
    options = GenerationOptions(
        num_loops=num_loops,
        max_new_tokens=problems.answers.shape[1],
        end_id=problems.end_id,
        cache=cache,
        exit_rule=None if known is None else known.make(threshold),
    )
    result = generate_with_loops(model, problems.tokens, options, problems.mask)
    said = torch.full_like(problems.answers, problems.end_id)
    said[:, : result.tokens.shape[1]] = result.tokens
    right = ((said == problems.answers) | (problems.answers == -100)).all(1)
    memory = model.make_cache(len(said), problems.tokens.shape[1] + said.shape[1] - 1, num_loops, cache).num_bytes
    return ExitRow(
        split=split,
        rule="fixed" if known is None else known.name,
        threshold=float(num_loops) if known is None else threshold,
        cache=cache,
        exact_match=right.float().mean().item(),
        mean_loops=result.mean_loops,
        cache_bytes=memory,
    )


def choose(rows: Sequence[ExitRow], rule: str, most_lost: float) -> float:
    """Return the threshold of the fewest loops that loses at most ``most_lost`` against the deepest fixed depth.

    Example:
        >>> names, same = ("rule", "threshold", "exact_match", "mean_loops"), {"cache": "per_loop", "cache_bytes": 1}
        >>> measured = [("fixed", 8, 0.98, 8.0), ("kl", 0.3, 0.9, 2.0), ("kl", 0.2, 0.98, 3.0), ("kl", 0.1, 0.98, 5.0)]
        >>> rows = [ExitRow(split="train", **dict(zip(names, values)), **same) for values in measured]
        >>> choose(rows, "kl", most_lost=0.001)
        0.2
    """
    train = [row for row in rows if row.split == "train"]
    best = max((row for row in train if row.rule == "fixed"), key=lambda row: row.threshold).exact_match
    kept = [row for row in train if row.rule == rule and row.exact_match >= best - most_lost]
    tried = [row for row in train if row.rule == rule]
    return min(kept or tried, key=lambda row: row.mean_loops if kept else -row.mean_loops).threshold


def equal_depth(fixed: Sequence[ExitRow], exact_match: float) -> ExitRow:
    """Return the least fixed depth that is right as often, or as often as any is where none is.

    Example:
        >>> names, same = ("threshold", "exact_match", "mean_loops"), {"split": "test", "cache": "per_loop"}
        >>> measured = [(2, 0.90, 2.0), (3, 0.98, 3.0), (4, 0.97, 4.0)]
        >>> rows = [ExitRow(rule="fixed", **dict(zip(names, values)), **same, cache_bytes=1) for values in measured]
        >>> equal_depth(rows, 0.95).threshold, equal_depth(rows, 1.0).threshold
        (3, 3)
    """
    most = min(exact_match, max(row.exact_match for row in fixed))
    return next(row for row in fixed if row.exact_match >= most)


def _measure_all(
    model: LoopedTransformer, sets: dict[str, Problems], num_loops: int, cache: str, others: Sequence[str]
) -> Iterator[ExitRow]:
    for split, problems in sets.items():
        depths = sorted({d for d in range(1, num_loops + 1) if d <= 16 or d % 8 == 0} | {num_loops})
        for depth in depths:
            yield _measure(model, problems, split=split, num_loops=depth, cache=cache)
        for known in exits_of(model):
            for threshold in known.tried:
                yield _measure(
                    model, problems, split=split, num_loops=num_loops, cache=cache, known=known, threshold=threshold
                )
    for other in others:
        yield _measure(model, sets["test"], split="test", num_loops=num_loops, cache=other)


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("exits", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of an arithmetic model")
    parser.add_argument("--num_loops", type=int, default=16, metavar="N", help="greatest depth of a token")
    parser.add_argument(
        "--cache", default="per_loop", help="cache that exits are measured with: per_loop, last, ring(K)"
    )
    parser.add_argument("--most_lost", type=float, default=0.001, help="share of answers a threshold may lose on train")
    parser.add_argument("--output", type=Path, default=None, help="folder to write to; default: the run directory")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.num_loops < 2:
        parser.error(f"`--num_loops` must be >= 2, got {args.num_loops}")
    if not 0 <= args.most_lost <= 1:
        parser.error(f"`--most_lost` must be a share, from 0 to 1, got {args.most_lost}")
    try:
        kept_loops(args.cache, args.num_loops)
    except ValueError as error:
        parser.error(str(error).replace("`cache`", "`--cache`", 1))
    data = read_run_data(args.run / "config.yaml").arithmetic()
    model = load_checkpoint(args.run / "checkpoints" / "last.ckpt")
    batches = [
        data.training_batch(index, optimizer_step=2**40) for index in range(-(-data.num_test // data.batch_size))
    ]
    # A batch is as wide as its longest problem.
    train = {
        name: pad_sequence([row for batch in batches for row in batch[name]], batch_first=True, padding_value=padding)
        for name, padding in (("input_ids", data.end_id), ("labels", -100))
    }
    test = data.held_out("test", data.num_test, data.min_digits, data.max_digits)
    sets = {"train": Problems.of(train, data.end_id), "test": Problems.of(test, data.end_id)}
    caches = ["per_loop", "last", *(f"ring({k})" for k in (2, 4, 8) if k < args.num_loops)]
    others = [cache for cache in caches if cache != args.cache]
    rows = list(_measure_all(model, sets, args.num_loops, args.cache, others))
    output = args.run if args.output is None else args.output
    output.mkdir(parents=True, exist_ok=True)
    with (output / "exits.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    _draw(rows, args.num_loops, args.cache, output)
    _report(rows, args.num_loops, args.cache, args.most_lost)
    told = ", ".join(str(output / name) for name in ("exits.csv", "exits.png", "caches.png"))
    sys.stdout.write(f"written: {told}\nnext:    {command_line('explore', args.run)}\n")
    return 0


def _draw(rows: Sequence[ExitRow], num_loops: int, cache: str, output: Path) -> None:
    test = [row for row in rows if row.split == "test"]
    plain = [row for row in test if row.cache == cache]
    by_rule = {
        rule: [(row.mean_loops, 100 * row.exact_match) for row in plain if row.rule == rule]
        for rule in dict.fromkeys(row.rule for row in plain)
    }
    ylabel = "exact match (%)"
    axes: dict[str, Any] = {"ylabel": ylabel, "limits": (-3.0, 103.0), "log_scale": True}
    exits = numbered_points(by_rule, title="Exits: accuracy by mean loops", xlabel="mean loops of a token", **axes)
    write_figure(output / "exits.png", exits)
    full = [row for row in test if row.rule == "fixed" and (row.cache != cache or row.threshold == num_loops)]
    by_cache = {row.cache: [(row.cache_bytes / 2**20, 100 * row.exact_match)] for row in full}
    title = f"Caches at {num_loops} loops: accuracy by memory"
    caches = numbered_points(by_cache, title=title, xlabel="keys and values (MiB)", **axes)
    write_figure(output / "caches.png", caches)


def _report(rows: Sequence[ExitRow], num_loops: int, cache: str, most_lost: float) -> None:
    """Print, for every rule at the threshold chosen on train, what it loses and saves on test."""
    from rich.console import Console
    from rich.table import Table

    test = [row for row in rows if row.split == "test" and row.cache == cache]
    fixed = sorted((row for row in test if row.rule == "fixed"), key=lambda row: row.threshold)
    deepest = fixed[-1]
    title = (
        f"Exits on the test set, thresholds chosen on train ({100 * deepest.exact_match:.1f} % at {num_loops} loops)"
    )
    table = Table(title=title)
    saved = f"saved of {num_loops}"
    table.add_column("rule", no_wrap=True)
    for column in ("threshold", "right (%)", "points lost", "loops", saved, "equal depth", "saved of it"):
        table.add_column(column, justify="right", no_wrap=column == "threshold")
    for rule in dict.fromkeys(row.rule for row in test if row.rule != "fixed"):
        threshold = choose(rows, rule, most_lost)
        row = next(row for row in test if row.rule == rule and row.threshold == threshold)
        equal = equal_depth(fixed, row.exact_match)
        table.add_row(
            rule,
            f"{threshold:g}",
            f"{100 * row.exact_match:.1f}",
            f"{100 * (deepest.exact_match - row.exact_match):.1f}",
            f"{row.mean_loops:.2f}",
            f"{1 - row.mean_loops / num_loops:.0%}",
            f"{equal.threshold:g}",
            f"{1 - row.mean_loops / equal.threshold:.0%}",
        )
    Console().print(table)
