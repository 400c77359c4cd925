"""What a training step costs: penalty, the authors' procedure, data; on the model of ``conf/stars.yaml``.

The batch is one of 4-digit additions, 16 tokens each, of which five or six have a label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from looplm.config import LoopedConfig
from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.depth import FixedDepth
from looplm.model import LoopedTransformer
from looplm.objective import STARSObjective
from looplm.randomness import StepKey
from looplm.stability.penalty import JacobianPenalty

from .authors_procedure import PlainLoopedTransformer, plain_loss
from .timing import Measurement, Row, paired_seconds, ratio_of

__all__ = [
    "STARS",
    "Precision",
    "Step",
    "addition_batch",
    "addition_model",
    "authors_rows",
    "authors_step",
    "data_rows",
    "model_step",
    "penalty_rows",
]

Precision: TypeAlias = Literal["32-true", "bf16-mixed"]  # Lightning's names
Step: TypeAlias = Callable[[], None]

NUM_LOOPS, BATCH, LENGTH, VOCABULARY = 6, 128, 16, 17
PLAIN = STARSObjective(depth_sampler=FixedDepth(NUM_LOOPS))
STARS = replace(PLAIN, penalty=JacobianPenalty(fraction=0.25), penalty_weight=0.02)
EVERY_SEQUENCE = replace(STARS, penalty=JacobianPenalty())
SPARING = replace(STARS, spare_unlabelled=True)


def addition_model(width: int = 256, max_positions: int = LENGTH, **fields: Any) -> LoopedTransformer:
    """Return the model of ``conf/stars.yaml``, untrained, at another width."""
    torch.manual_seed(0)
    size = {"width": width, "num_heads": width // 32, "ffn_width": 2 * width, "max_positions": max_positions}
    return LoopedTransformer(
        LoopedConfig(vocab_size=VOCABULARY, **size, **{"dropout": 0.0, "init_std": 0.05, **fields})
    )


def addition_batch(batch_size: int = BATCH) -> dict[str, Tensor]:
    return ArithmeticDataModule(min_digits=4, max_digits=4, batch_size=batch_size).training_batch(0)


def _optimised(model: torch.nn.Module, loss_fn: Callable[[], Tensor], precision: Precision) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = loss_fn()
        loss.backward()
        optimizer.step()

    return run


def model_step(model: LoopedTransformer, objective: STARSObjective, precision: Precision = "32-true") -> Step:
    """Return a whole step on a fixed batch: forward, backward, optimiser."""
    batch, key = addition_batch(), StepKey(seed=0, micro_batch=0)
    return _optimised(model, lambda: objective(model, batch, key).loss, precision)


def authors_step(
    model: LoopedTransformer, precision: Precision = "32-true", num_loops: int = NUM_LOOPS, fused_norms: bool = True
) -> Step:
    """Return the authors' step on the same batch, from the weights of our model."""
    plain, batch = PlainLoopedTransformer(model, fused_norms), addition_batch()

    def loss() -> Tensor:
        return plain_loss(plain, batch["input_ids"], batch["labels"], num_loops, STARS.penalty_weight)

    return _optimised(plain, loss, precision)


def penalty_rows(num_rounds: int) -> list[Row]:
    """The step with the penalty over the step without."""
    rows = []
    for name, objective, target in (
        ("a quarter of the sequences", STARS, 1.15),
        ("every sequence", EVERY_SEQUENCE, 1.40),
    ):
        with_penalty, without = model_step(addition_model(), objective), model_step(addition_model(), PLAIN)
        measured = ratio_of(*paired_seconds(with_penalty, without, num_rounds))
        rows.append(Row(f"STARS step, penalty on {name}", "the step without penalty", measured, target, "at most"))
    return rows


def authors_rows(num_rounds: int) -> list[Row]:
    """The authors' step over ours, same weights, batch and depth; then at the depths of a run."""
    default, sparing = ("STARS step", STARS), ("STARS step, spare_unlabelled", SPARING)
    unfused, fused = ("no fused operations", False), ("torch's LayerNorm", True)
    kinds: list[tuple[tuple[str, STARSObjective], Precision, tuple[str, bool], Precision]] = [
        (default, "32-true", unfused, "32-true"),
        (sparing, "32-true", unfused, "32-true"),
        (sparing, "32-true", fused, "32-true"),
        (sparing, "bf16-mixed", fused, "bf16-mixed"),
        (sparing, "bf16-mixed", fused, "32-true"),
    ]
    rows = []
    for (name, objective), ours, (norms, fused_norms), theirs in kinds:
        model = addition_model()
        before, after = authors_step(model, theirs, fused_norms=fused_norms), model_step(model, objective, ours)
        rows.append(_authors_row(f"{name}, {ours}", f"{norms}, {theirs}", before, after, num_rounds))
    return [*rows, _row_of_a_run(max(3, num_rounds // 5))]


def _authors_row(what: str, against: str, before: Step, after: Step, num_rounds: int) -> Row:
    measured = ratio_of(*paired_seconds(before, after, num_rounds))
    return Row(what, f"the authors' procedure, {against}", measured, 1.7, "at least", "x faster")


def _row_of_a_run(num_rounds: int) -> Row:
    """Steps at eight depths, quantiles of the second stage of ``conf/stars.yaml``, which backpropagates through six."""
    law = NormalDist(mu=2.5, sigma=0.9)
    depths = [round(math.exp(law.inv_cdf((2 * index + 1) / 16))) for index in range(8)]
    model = addition_model()
    before = [authors_step(model, num_loops=depth) for depth in depths]
    truncated = replace(SPARING, backprop_loops=6)
    after = [model_step(model, replace(truncated, depth_sampler=FixedDepth(depth))) for depth in depths]
    against = "torch's LayerNorm, 32-true, backpropagating through all"
    what = f"STARS steps of {depths[0]} to {depths[-1]} loops, spare_unlabelled, 32-true, backpropagating through six"
    return _authors_row(what, against, _in_turn(before), _in_turn(after), num_rounds)


def _in_turn(steps: list[Step]) -> Step:
    def run() -> None:
        for step in steps:
            step()

    return run


def data_rows(num_rounds: int) -> list[Row]:
    """Making a batch of additions, as a share of the step that reads it."""
    data = ArithmeticDataModule(min_digits=3, max_digits=3, batch_size=BATCH)
    numbers = iter(range(10**9))

    def load() -> None:
        for _ in range(20):  # one is too short to time
            data.training_batch(next(numbers))

    loading, step = paired_seconds(load, model_step(addition_model(), STARS), num_rounds)
    share = ratio_of(loading, step)
    percent = Measurement(*(100 * value / 20 for value in (share.value, share.low, share.high)))
    return [Row("data loading, addition", "the training step", percent, 2.0, "at most", "%")]
