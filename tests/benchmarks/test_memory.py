"""Peak bytes of a step, counted on a small model."""

from __future__ import annotations

import torch

from looplm import FixedDepth, LoopedConfig, LoopedTransformer, STARSObjective
from looplm.loop import SegmentLength
from looplm.randomness import StepKey

from .memory import PeakBytes


def _peak(num_loops: int, checkpoint_loops: SegmentLength | None) -> int:
    model = LoopedTransformer(
        LoopedConfig(vocab_size=7, max_positions=8, width=32, num_heads=2, ffn_width=64, dropout=0.0)
    )
    objective = STARSObjective(depth_sampler=FixedDepth(num_loops), checkpoint_loops=checkpoint_loops)
    tokens = torch.zeros(32, 8, dtype=torch.long)
    with PeakBytes() as peak:
        objective(model, {"input_ids": tokens, "labels": tokens}, StepKey(seed=0, micro_batch=0)).loss.backward()
    return peak.bytes


def test_what_a_loop_more_costs_at_the_peak() -> None:
    state = 32 * 8 * 32 * 4
    # 48 states more, one a loop.
    assert (_peak(64, 1) - _peak(16, 1)) / state < 52
    # 4 segments more, and 4 loops more in one.
    assert (_peak(64, "sqrt") - _peak(16, "sqrt")) / state < 12
    assert (_peak(64, None) - _peak(16, None)) / state > 400
