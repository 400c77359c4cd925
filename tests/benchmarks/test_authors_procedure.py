"""The plain procedure computes what ours computes; otherwise nothing could be held against it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from looplm.depth import FixedDepth
from looplm.objective import STARSObjective
from looplm.randomness import StepKey
from looplm.stability.penalty import StarsReleasePenalty

from .authors_procedure import PlainLoopedTransformer, plain_answer, plain_loss
from .training_step import addition_model


@pytest.mark.parametrize("fused_norms", [True, False])
def test_loss_and_answers_are_those_of_our_model(fused_norms: bool) -> None:
    model = addition_model(64, 12).eval()
    plain = PlainLoopedTransformer(model, fused_norms)
    tokens = torch.randint(17, (64, 8), generator=torch.Generator().manual_seed(1))
    objective = STARSObjective(depth_sampler=FixedDepth(3), penalty=StarsReleasePenalty(), penalty_weight=0.5)
    batch, key = {"input_ids": tokens, "labels": tokens}, StepKey(seed=0, micro_batch=0)
    out = objective(model, batch, key)
    torch.manual_seed(0)
    # The vectors differ, so that one draw of the penalty is compared over many numbers only.
    torch.testing.assert_close(plain_loss(plain, tokens, tokens, 3, 0.0), out.cross_entropy, rtol=1e-5, atol=1e-6)
    assert out.penalty is not None
    torch.testing.assert_close(plain_loss(plain, tokens, tokens, 3, 1.0), out.penalty, rtol=0.1, atol=0.0)
    without = replace(objective, penalty=None, penalty_weight=0.0)
    torch.testing.assert_close(without(model, batch, key).loss, plain_loss(plain, tokens, tokens, 3, 0.0))
    with torch.no_grad():
        expected = model(torch.cat([tokens[0], plain_answer(plain, tokens[0], 3, 5)])[None], 5)[0, 7:-1].argmax(-1)
    assert torch.equal(plain_answer(plain, tokens[0], 3, 5), expected)
