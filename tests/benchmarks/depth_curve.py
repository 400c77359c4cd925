"""A whole depth curve: every depth in one pass of a batch, against a problem and a depth at a time."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.scoring import predictions_at_depths

from .authors_procedure import PlainLoopedTransformer, plain_answer
from .timing import Row, ratio_of, timed
from .training_step import addition_model

__all__ = ["curve_rows"]

DEPTHS = list(range(0, 101, 2))
NUM_PROBLEMS, NUM_TIMED = 1000, 20


def curve_rows(num_rounds: int) -> list[Row]:
    """The time of the authors' curve over ours, in turns: one problem of theirs, a twentieth of the problems of ours.

    Each of theirs is answered at five of the 51 depths, evenly spread, and the time scaled by the loops of all. What
    the plain procedure answers at a middle depth is taken for the right answer: an untrained model then is right at
    some depths and wrong at others, and both procedures must agree on which.
    """
    num_timed = min(2 * num_rounds, NUM_TIMED)
    return [_row(width, target, num_timed) for width, target in ((128, 500.0), (512, 100.0))]


def _row(width: int, target: float, num_timed: int) -> Row:
    data = ArithmeticDataModule(min_digits=4, max_digits=4, num_test=NUM_PROBLEMS)
    model = addition_model(width, data.max_positions, init_std=0.08).eval()
    columns = data.held_out("test", NUM_PROBLEMS, 4, 4)
    inputs, mask, labels = columns["input_ids"], columns["attention_mask"], columns["labels"]
    plain = PlainLoopedTransformer(model).eval()
    theirs, ours = [], []
    for turn, row in enumerate(random.Random(0).sample(range(NUM_PROBLEMS), num_timed)):
        where = (labels[row] != -100).nonzero().flatten()
        prompt = inputs[row, : where[0] + 1]
        depths = DEPTHS[turn % 10 :: 10]
        seconds, answers = timed(lambda: {d: plain_answer(plain, prompt, len(where), d) for d in depths})  # noqa: B023
        theirs.append(seconds * sum(DEPTHS) / sum(depths) * NUM_PROBLEMS / NUM_TIMED)
        chunk = slice(turn * NUM_PROBLEMS // NUM_TIMED, (turn + 1) * NUM_PROBLEMS // NUM_TIMED)
        ours.append(timed(lambda: predictions_at_depths(model, inputs[chunk], DEPTHS, mask[chunk]))[0])  # noqa: B023
        _check_answers(model, inputs[row], mask[row], where, answers)
    measured = ratio_of(theirs, ours)
    what = f"depth curve 0, 2, …, 100, {NUM_PROBLEMS} problems, width {width}"
    return Row(what, "the authors' procedure", measured, target, "at least", "x faster")


def _check_answers(model: torch.nn.Module, inputs: Tensor, mask: Tensor, where: Tensor, answers: dict) -> None:
    right_answer = answers[sorted(answers)[len(answers) // 2]]
    tokens = inputs.clone()
    tokens[where[1:]] = right_answer[:-1]
    preds = predictions_at_depths(model, tokens[None], DEPTHS, mask[None])[:, 0, where]
    for depth, answer in answers.items():
        ours, theirs = torch.equal(preds[DEPTHS.index(depth)], right_answer), torch.equal(answer, right_answer)
        assert ours == theirs, f"depth {depth}: right is {ours} here and {theirs} in the authors' procedure"
