"""Loops that are run again in the backward pass give the same gradients in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from looplm import FixedDepth, JacobianPenalty, LastStepPenalty, LoopedConfig, LoopedTransformer, STARSObjective
from looplm.loop import SegmentLength
from looplm.objective import ObjectiveOutput
from looplm.randomness import StepKey

KEY = StepKey(seed=1, micro_batch=2)
DEPTH = 7


def _model(**changes: Any) -> LoopedTransformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "max_positions": 6, "width": 16, "num_heads": 2, "ffn_width": 32, "num_prelude_layers": 1}
    return LoopedTransformer(LoopedConfig(**{**sizes, "init_std": 0.3, "dropout": 0.0, **changes}))


def _run(model: LoopedTransformer, checkpoint_loops: SegmentLength | None, **options: Any) -> ObjectiveOutput:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (3, 6), generator=draw)
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones(3, 6)}
    objective = STARSObjective(depth_sampler=FixedDepth(DEPTH), checkpoint_loops=checkpoint_loops, **options)
    torch.manual_seed(5)  # dropout
    return objective(model, batch, KEY)


def _gradients(model: LoopedTransformer, out: ObjectiveOutput) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.loss, list(model.parameters()), materialize_grads=True)


@pytest.mark.parametrize("checkpoint_loops", [1, 2, 3, 20, "sqrt"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"backprop_loops": 4}, id="truncated"),
        pytest.param({"penalty": JacobianPenalty(fraction=0.5), "penalty_weight": 0.3}, id="penalty"),
        pytest.param({"penalty": JacobianPenalty(method="jvp"), "penalty_weight": 0.3, "backprop_loops": 2}, id="jvp"),
        pytest.param({"penalty": JacobianPenalty(method="vjp"), "penalty_weight": 0.3}, id="vjp"),
        # Its gradient enters the last two states.
        pytest.param({"penalty": LastStepPenalty(), "penalty_weight": 0.5}, id="last-step"),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2, "input_injection": "linear"}], ids=["", "dropout-injection"])
def test_loss_and_gradients_are_the_same_to_the_bit(
    checkpoint_loops: SegmentLength, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    model = _model(**changes)
    plain, again = _run(model, None, **options), _run(model, checkpoint_loops, **options)
    assert torch.equal(plain.loss, again.loss)
    for expected, found in zip(_gradients(model, plain), _gradients(model, again), strict=True):
        # Segments change the order in which a shared weight's gradients are added.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def _kept_bytes(checkpoint_loops: SegmentLength | None, depth: int, spare_unlabelled: bool = False) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, weights left out."""
    model, kept = _model(), {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(3, 6, dtype=torch.long)
    labels = tokens.masked_fill(torch.arange(6) < 3, -100) if spare_unlabelled else tokens
    objective = STARSObjective(
        depth_sampler=FixedDepth(depth), checkpoint_loops=checkpoint_loops, spare_unlabelled=spare_unlabelled
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = objective(model, {"input_ids": tokens, "labels": labels}, KEY)
    del out
    return sum(kept.values())


def test_a_checkpointed_loop_keeps_one_state() -> None:
    state = 3 * 6 * 16 * 4
    # What a loop adds, with everything else equal.
    whole, each = ((_kept_bytes(length, 30) - _kept_bytes(length, 10)) / 20 / state for length in (None, 1))
    assert each == pytest.approx(1, abs=0.05)
    assert whole > 10
    in_segments = (_kept_bytes("sqrt", 64) - _kept_bytes("sqrt", 16)) / state
    assert in_segments == pytest.approx(4, abs=0.5)  # 8 segments less 4


def test_the_last_loop_keeps_no_more_where_unlabelled_positions_are_spared() -> None:
    assert _kept_bytes(1, 5, spare_unlabelled=True) <= _kept_bytes(1, 5)


@pytest.mark.parametrize("value", [0, -1, "square"])
def test_wrong_segment_length_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`checkpoint_loops` must be >= 1, 'sqrt' or null, got"):
        STARSObjective(depth_sampler=FixedDepth(1), checkpoint_loops=value)
