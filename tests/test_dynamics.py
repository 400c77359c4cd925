"""Trajectories of maps whose every state has a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from looplm.dynamics import (
    QUANTITIES,
    Trajectory,
    finite_time_lyapunov,
    fixed_point_residual,
    measure_dynamics,
    step_function,
)
from looplm.loop import LoopState

DEPTHS = [0, 1, 4, 9]


class Linear(nn.Module):
    """``h ↦ h Aᵀ`` on each of T positions; A is symmetric, so that its eigenvalues are its gains."""

    def __init__(self, eigenvalues=(0.9, -0.4, 0.1), rate_by_depth=None):
        super().__init__()
        self.eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator()).double())[0]
        self.basis = basis
        self.matrix = nn.Parameter(basis @ torch.diag(self.eigenvalues) @ basis.T)
        self.rate_by_depth = rate_by_depth
        self.num_steps = 0

    def embed(self, inputs, attention_mask=None, initial_hidden=None):
        context = {} if attention_mask is None else {"attention_mask": attention_mask}
        return LoopState(inputs if initial_hidden is None else initial_hidden, context)

    def step(self, state):
        self.num_steps += 1
        rate = 1.0 if self.rate_by_depth is None else self.rate_by_depth[state.depth]
        return state.advance(rate * state.hidden @ self.matrix.T)

    def decode(self, state):
        return state.hidden


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(batch=3, length=2, width=3):
    return torch.randn(batch, length, width, generator=generator(1), dtype=torch.float64)


def test_residual_is_relative_to_the_following_state():
    h, following = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    expected = torch.tensor([3 / 4, 5**0.5 / 2])
    torch.testing.assert_close(fixed_point_residual(h, following), expected)


def test_residual_of_a_fixed_point_is_zero_even_at_the_origin():
    assert fixed_point_residual(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]
    assert fixed_point_residual(torch.ones(1, 3), torch.ones(1, 3)).tolist() == [0]


def test_residual_leaves_padding_out_and_joins_the_parts_of_a_dict():
    h = {"tokens": torch.zeros(1, 2, 1), "memory": torch.zeros(1, 1)}
    following = {"tokens": torch.tensor([[[3.0], [100.0]]]), "memory": torch.tensor([[4.0]])}
    assert fixed_point_residual(h, following, torch.tensor([[1, 0]])).item() == 1.0
    kept = {"tokens": torch.tensor([[[3.0], [-7.0]]]), "memory": torch.tensor([[0.0]])}
    assert fixed_point_residual(kept, following, torch.tensor([[1, 0]])).item() == pytest.approx(4 / 5)


def test_step_function_keeps_context_and_depth():
    seen = []

    class Records(Linear):
        def step(self, state):
            seen.append((state.depth, state.context))
            return super().step(state)

    model = Records()
    state = LoopState(start(), {"attention_mask": torch.ones(3, 2)}, depth=5)
    torch.testing.assert_close(step_function(model, state)(state.hidden), state.hidden @ model.matrix.T)
    assert seen == [(5, state.context)]


@pytest.mark.parametrize("method", ["finite_difference", "jvp"])
def test_lyapunov_exponent_of_a_scaled_rotation_is_the_log_of_its_scale(method):
    """Every direction grows alike: exact at every time."""
    scale = 1.3
    turn = torch.tensor([[math.cos(1.0), -math.sin(1.0)], [math.sin(1.0), math.cos(1.0)]], dtype=torch.float64)
    model = Linear()
    model.matrix = nn.Parameter(scale * turn)
    state = model.embed(torch.ones(2, 3, 2, dtype=torch.float64))
    found = finite_time_lyapunov(model, state, 6, generator=generator(), method=method)
    torch.testing.assert_close(found, torch.full((6, 2), math.log(scale), dtype=torch.float64), rtol=1e-8, atol=0)


def test_lyapunov_exponent_tends_to_the_log_of_the_spectral_radius():
    model = Linear()
    found = finite_time_lyapunov(model, model.embed(start(batch=16)), 300, generator=generator())
    assert found[-1].mean().item() == pytest.approx(math.log(0.9), abs=0.01)


def test_lyapunov_exponent_is_taken_along_the_trajectory():
    """A map that changes with depth: the mean over the steps that were made."""
    rates = [2.0, 3.0, 0.5]
    model = Linear(eigenvalues=(1.0, 1.0, 1.0), rate_by_depth=rates)
    found = finite_time_lyapunov(model, model.embed(start()), 3, generator=generator())
    expected = torch.tensor(rates).log().cumsum(0) / torch.arange(1, 4)
    torch.testing.assert_close(found, expected.double()[:, None].expand(3, 3))


def test_lyapunov_exponent_refuses_what_it_cannot_use():
    model = Linear()
    with pytest.raises(ValueError, match="`num_loops` must be >= 1, got 0"):
        finite_time_lyapunov(model, model.embed(start()), 0, generator=generator())
    with pytest.raises(ValueError, match="use `finite_difference` or `jvp`"):
        finite_time_lyapunov(model, model.embed(start()), 1, generator=generator(), method="vjp")


def _path(model: Linear, state: LoopState, depths: list[int]) -> Trajectory:
    return measure_dynamics(model, state, depths, num_products=0, num_samples=0, num_iterations=0, with_lyapunov=False)[
        1
    ]


def test_recorded_states_are_those_of_the_closed_form():
    model = Linear()
    trajectory = _path(model, model.embed(start()), DEPTHS)
    assert model.num_steps == DEPTHS[-1] + len(DEPTHS)  # a residual takes a step
    for index, depth in enumerate(DEPTHS):
        expected = start() @ torch.linalg.matrix_power(model.matrix.T, depth)
        torch.testing.assert_close(trajectory.states[index], expected.flatten(1).float())
        torch.testing.assert_close(trajectory.norms[index], expected.flatten(1).norm(dim=1).float())
        torch.testing.assert_close(
            trajectory.residuals[index], fixed_point_residual(expected, expected @ model.matrix.T).detach().float()
        )


def test_padding_has_no_part_in_a_trajectory():
    model, mask = Linear(), torch.tensor([[1, 0], [1, 1], [0, 1]])
    hidden = start()
    polluted = torch.where(mask[..., None] == 1, hidden, torch.full_like(hidden, 1e3))
    clean, dirty = (_path(model, model.embed(h, mask), [0, 2]) for h in (hidden, polluted))
    assert torch.equal(clean.states, dirty.states)
    assert torch.equal(clean.residuals, dirty.residuals)


def test_principal_components_keep_all_distances_when_there_are_enough():
    model = Linear()
    trajectory = _path(model, model.embed(start(batch=2)), DEPTHS)
    coordinates, shares = trajectory.principal_components(6)
    assert coordinates.shape == (4, 2, 6)
    assert shares.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (shares.diff() <= 0).all()
    states = trajectory.states.flatten(0, 1)
    torch.testing.assert_close(
        torch.cdist(coordinates.flatten(0, 1), coordinates.flatten(0, 1)), torch.cdist(states, states)
    )


@pytest.mark.parametrize("number", [0, 7])
def test_number_of_components_is_checked(number):
    model = Linear()
    trajectory = _path(model, model.embed(start(batch=2)), DEPTHS)
    with pytest.raises(ValueError, match=rf"`num_components` must be in \[1, 6\] for these states, got {number}"):
        trajectory.principal_components(number)


@pytest.mark.parametrize("method", ["finite_difference", "jvp"])
def test_measured_quantities_are_those_of_the_linear_map(method):
    model = Linear()
    values, trajectory = measure_dynamics(model, model.embed(start(batch=4)), DEPTHS, method=method, num_samples=400)
    assert set(values) == {*QUANTITIES, "mean_gain_standard_error"}
    assert all(column.shape == (4, 4) for column in values.values())
    torch.testing.assert_close(values["spectral_radius"], torch.full((4, 4), 0.9), rtol=1e-3, atol=0)
    torch.testing.assert_close(values["spectral_norm"], torch.full((4, 4), 0.9), rtol=1e-3, atol=0)
    gain = (0.9**2 + 0.4**2 + 0.1**2) / 3
    assert ((values["mean_gain"] - gain).abs() < 5 * values["mean_gain_standard_error"]).all()
    torch.testing.assert_close(values["state_norm"], trajectory.norms)
    assert values["lyapunov_exponent"][0].isnan().all()
    assert values["lyapunov_exponent"][-1].mean().item() == pytest.approx(math.log(0.9), abs=0.15)


def test_what_is_not_asked_for_is_not_measured():
    model = Linear()
    values, trajectory = measure_dynamics(
        model, model.embed(start()), [2], num_products=0, num_samples=0, num_iterations=0, with_lyapunov=False
    )
    assert set(values) == {"residual", "state_norm"}
    assert model.num_steps == 3
    assert trajectory.depths == [2]


def test_measuring_is_a_function_of_the_seed_and_records_no_gradient():
    model = Linear()

    def measured(seed):
        return measure_dynamics(model, model.embed(start()), [0, 3], seed=seed)[0]

    first = measured(1)
    before = torch.random.get_rng_state()
    again = measured(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name].nan_to_num(), again[name].nan_to_num()) for name in first)
    assert not torch.equal(first["mean_gain"], measured(2)["mean_gain"])
    assert not any(column.requires_grad for column in first.values())


def test_a_state_that_overflows_is_measured_as_undefined_not_as_an_error():
    model = Linear(eigenvalues=(1e15, 1.0, 1.0)).float()
    values, _ = measure_dynamics(model, model.embed(start().float()), [0, 3])
    assert not values["spectral_radius"][1].isfinite().any()
    assert not values["residual"][1].isfinite().any()
    assert values["residual"][0].isfinite().all()
