"""Eigenvalues against closed forms and dense algebra."""

from __future__ import annotations

import pytest
import torch
from oracles import LENGTH, MAPS, MASKS, WIDTH, apply, dense_jacobians, every_block, non_normal, normal_map, transformer

from looplm.dynamics import step_function
from looplm.stability.spectra import dense_jacobian, exact_spectrum, leading_eigenvalues

pytest.importorskip("scipy")
PRODUCTS = ["finite_difference", "jvp", "vjp"]


def distance(found, expected):
    """Largest distance of a found eigenvalue to the spectrum, relative to the spectral radius."""
    found, expected = found.to(torch.complex128), expected.to(torch.complex128)
    return ((found[:, None] - expected[None]).abs().amin(1).max() / expected.abs().max()).item()


def same(found, expected):
    """Distance between two spectra, both ways."""
    assert len(found) == len(expected)
    return max(distance(found, expected), distance(expected, found))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("seed", range(3))
def test_arnoldi_finds_the_leading_eigenvalues_of_a_known_map(name, seed):
    matrix = MAPS[name](40, seed)
    expected = torch.linalg.eigvals(matrix)
    expected = expected[expected.abs().argsort(descending=True)]
    (found,) = leading_eigenvalues(apply(matrix), torch.zeros(1, 40, dtype=torch.float64), 4)
    bar = 1e-3 if name.startswith("jordan") else 1e-4
    assert distance(found, expected) < bar
    torch.testing.assert_close(found.abs(), expected[:4].abs(), rtol=bar, atol=0)


@pytest.mark.parametrize("method", PRODUCTS)
def test_arnoldi_needs_no_particular_product(method):
    matrix = non_normal(40, 0)
    (found,) = leading_eigenvalues(apply(matrix), torch.zeros(1, 40, dtype=torch.float64), 3, method=method)
    assert distance(found, torch.linalg.eigvals(matrix)) < 1e-4


@pytest.mark.parametrize(("norm_placement", "norm_type"), every_block)
def test_arnoldi_of_a_transformer_equals_dense_algebra(norm_placement, norm_type):
    model, state = transformer(norm_placement, norm_type)
    step_fn = step_function(model, state)
    found = leading_eigenvalues(step_fn, state.hidden, 4)
    for values, jacobian in zip(found, dense_jacobians(step_fn, state.hidden), strict=True):
        expected = torch.linalg.eigvals(jacobian)
        assert distance(values, expected) < 1e-4
        assert values[0].abs().item() == pytest.approx(expected.abs().max().item(), rel=1e-4)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_placement", ["pre_norm", "post_norm", "sandwich_branch", "sandwich_dual"])
def test_exact_spectrum_of_a_transformer_is_that_of_its_real_positions(norm_placement, causal, padding):
    mask = MASKS[padding]
    model, state = transformer(norm_placement, mask=mask)
    step_fn = step_function(model, state)
    found = exact_spectrum(step_fn, state.hidden, mask=mask, causal=causal)
    for values, jacobian in zip(found, dense_jacobians(step_fn, state.hidden, mask), strict=True):
        # A triangular map's eigenvalues over positions are ill-conditioned: that is what `causal` is for.
        assert same(values, torch.linalg.eigvals(jacobian)) < 1e-5
        assert (values.abs().diff() <= 1e-12).all()


@pytest.mark.parametrize("padding", MASKS)
def test_arnoldi_sees_real_positions_alone(padding):
    mask = MASKS[padding]
    model, state = transformer("sandwich_dual", mask=mask)
    step_fn = step_function(model, state)
    found = leading_eigenvalues(step_fn, state.hidden, 3, mask=mask)
    exact = exact_spectrum(step_fn, state.hidden, mask=mask, causal=True)
    for values, expected in zip(found, exact, strict=True):
        assert distance(values, expected) < 1e-4


@pytest.mark.parametrize("method", PRODUCTS)
def test_dense_jacobian_is_the_jacobian_not_its_transpose(method):
    matrix = non_normal(6, 0)
    found = dense_jacobian(apply(matrix), torch.zeros(2, 6, dtype=torch.float64), method=method)
    torch.testing.assert_close(found, matrix.expand(2, -1, -1))


def test_a_dict_state_has_one_spectrum():
    matrix = normal_map(6, 0)

    def step(h):
        flat = torch.cat([h["a"].flatten(1), h["b"]], 1) @ matrix.T
        return {"a": flat[:, :4].reshape(-1, 2, 2), "b": flat[:, 4:]}

    states = {"a": torch.zeros(1, 2, 2, dtype=torch.float64), "b": torch.zeros(1, 2, dtype=torch.float64)}
    (found,) = exact_spectrum(step, states)
    assert same(found, torch.linalg.eigvals(matrix)) < 1e-10
    with pytest.raises(ValueError, match="`causal` needs a state that is one tensor"):
        exact_spectrum(step, states, causal=True)


def test_small_spaces_are_solved_densely_and_filled_up():
    matrix = normal_map(4, 0)
    (found,) = leading_eigenvalues(apply(matrix), torch.zeros(1, 4, dtype=torch.float64), 6)
    assert same(found[:4], torch.linalg.eigvals(matrix)) < 1e-10
    assert found[4:].isnan().all()


def test_a_map_to_zero_and_one_that_overflows_spoil_no_neighbour():
    scales = torch.tensor([0.0, float("nan"), 0.5], dtype=torch.float64)[:, None]
    found = leading_eigenvalues(lambda h: scales * h @ normal_map(20, 0).T, torch.zeros(3, 20, dtype=torch.float64), 2)
    assert found[0].tolist() == [0, 0]
    assert found[1].isnan().all()
    assert found[2].abs().tolist() == pytest.approx([0.45, 0.36])


def test_a_number_of_eigenvalues_below_one_is_refused():
    with pytest.raises(ValueError, match="`k` must be >= 1, got 0"):
        leading_eigenvalues(lambda h: h, torch.ones(1, 2), 0)


def test_shapes_of_the_oracle_are_what_the_tests_assume():
    _, state = transformer("post_norm")
    assert state.hidden.shape == (3, LENGTH, WIDTH)
