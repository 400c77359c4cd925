"""What a training step costs: penalty, the authors' procedure, data; on the model of ``conf/stars.yaml``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    "addition_model",
    "authors_rows",
    "authors_step",
    "data_rows",
    "model_step",
    "penalty_rows",
    "random_batch",
]

Precision: TypeAlias = Literal["32-true", "bf16-mixed"]  # Lightning's names
Step: TypeAlias = Callable[[], None]

NUM_LOOPS, BATCH, LENGTH, VOCABULARY = 6, 128, 16, 17
PLAIN = STARSObjective(depth_sampler=FixedDepth(NUM_LOOPS))
STARS = replace(PLAIN, penalty=JacobianPenalty(fraction=0.25), penalty_weight=0.02)
EVERY_SEQUENCE = replace(STARS, penalty=JacobianPenalty())


def addition_model(width: int = 256, max_positions: int = LENGTH, **fields: Any) -> LoopedTransformer:
    """Return the model of ``conf/stars.yaml``, untrained, at another width."""
    torch.manual_seed(0)
    size = {"width": width, "num_heads": width // 32, "ffn_width": 2 * width, "max_positions": max_positions}
    return LoopedTransformer(
        LoopedConfig(vocab_size=VOCABULARY, **size, **{"dropout": 0.0, "init_std": 0.05, **fields})
    )


def random_batch(batch_size: int = BATCH) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens.roll(-1, 1)}


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
    batch, key = random_batch(), StepKey(seed=0, micro_batch=0)
    return _optimised(model, lambda: objective(model, batch, key).loss, precision)


def authors_step(model: LoopedTransformer, precision: Precision = "32-true") -> Step:
    """Return the authors' step on the same batch, from the weights of our model."""
    plain, batch = PlainLoopedTransformer(model), random_batch()

    def loss() -> Tensor:
        return plain_loss(plain, batch["input_ids"], batch["labels"], NUM_LOOPS, STARS.penalty_weight)

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
    """The authors' step over ours, same weights, batch and precision; and over ours in the narrower one."""
    pairs: list[tuple[Precision, Precision]] = [
        ("32-true", "32-true"),
        ("bf16-mixed", "bf16-mixed"),
        ("bf16-mixed", "32-true"),
    ]
    rows = []
    for ours, theirs in pairs:
        model = addition_model()
        times = paired_seconds(authors_step(model, theirs), model_step(model, STARS, ours), num_rounds)
        against = f"the authors' procedure, {theirs}"
        rows.append(Row(f"STARS step, {ours}", against, ratio_of(*times), 1.7, "at least", "x faster"))
    return rows


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
