"""The settling penalty against its definition, token by token and loop by loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from looplm import ResidualExit, SettlingPenalty
from looplm.exits import LoopSignals


def by_definition(trajectory: Tensor, is_right: Tensor, margin: float) -> float:
    still, moving = [], []
    for token in range(trajectory.shape[1]):
        for loop in range(1, len(trajectory)):
            now, before = trajectory[loop, token], trajectory[loop - 1, token]
            residual = ((now - before).norm() / now.norm()).item()
            if bool(is_right[loop - 1 :, token].all()):
                still.append(residual)
            elif not bool(is_right[loop:, token].all()):
                moving.append(max(margin - residual, 0.0))
    return sum(sum(terms) / max(len(terms), 1) for terms in (still, moving))


@given(st.integers(2, 5), st.integers(1, 4), st.floats(0, 3), st.integers(0, 1000))
def test_penalty_is_its_definition(num_states: int, num_tokens: int, margin: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trajectory = torch.randn(num_states, num_tokens, 3, generator=generator)
    is_right = torch.rand(num_states, num_tokens, generator=generator) < 0.6
    found = SettlingPenalty(margin)(trajectory, is_right).item()
    assert found == pytest.approx(by_definition(trajectory, is_right, margin), abs=1e-3)


def test_a_penalty_of_zero_is_an_exit_that_errs_nowhere() -> None:
    # Right after the third loop; still from then on, moving before.
    trajectory = torch.tensor([1.0, 4.0, 16.0, 16.0, 16.0])[:, None, None].expand(5, 1, 2)
    is_right = torch.tensor([False, False, True, True, True])[:, None]
    assert SettlingPenalty(0.4)(trajectory, is_right).item() == pytest.approx(0.0, abs=1e-4)
    exits = [
        bool(ResidualExit(0.3)(LoopSignals(depth=loop + 1, previous=trajectory[loop - 1], hidden=trajectory[loop])))
        for loop in range(1, 5)
    ]
    assert exits == [False, False, True, True]


@pytest.mark.parametrize("is_right", [True, False])
def test_gradient_is_finite_where_nothing_moves(is_right: bool) -> None:
    trajectory = torch.ones(3, 2, 4, requires_grad=True)
    SettlingPenalty(0.4)(trajectory, torch.full((3, 2), is_right)).backward()
    assert trajectory.grad is not None
    assert bool(trajectory.grad.isfinite().all())


def test_without_tokens_the_penalty_is_zero() -> None:
    assert SettlingPenalty()(torch.ones(3, 0, 4), torch.ones(3, 0, dtype=torch.bool)).item() == 0.0


def test_negative_margin_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`margin` must be >= 0, got -0\.1"):
        SettlingPenalty(-0.1)
