"""Estimators against maps whose spectra are known, and against dense algebra of small transformers."""

from __future__ import annotations

import math
import time

import pytest
import torch
from oracles import (
    MAPS,
    MASKS,
    PLACEMENTS,
    RHO,
    apply,
    defective,
    dense_jacobians,
    generator,
    non_normal,
    normal,
    normal_map,
    transformer,
)

from looplm.dynamics import step_function
from looplm.loop import LoopState
from looplm.stability.estimators import mean_gain, spectral_norm, spectral_radius
from looplm.stability.products import PRODUCTS
from looplm.stability.vectors import random_unit

SIZE, STARTS = 24, 32
METHODS = ["finite_difference", "jvp", "vjp"]
BARS = {"normal": 0.02, "complex_pair": 0.05, "jordan_2": 0.05, "jordan_3": 0.05, "non_normal": 0.05}


def mean_log_error(matrix, num_products, method="jvp", seed=0):
    """Error of the geometric mean over start vectors, relative to the true radius."""
    states = torch.zeros(STARTS, len(matrix), dtype=torch.float64)
    radii = spectral_radius(apply(matrix), states, generator=generator(seed), num_products=num_products, method=method)
    return abs(radii.log().mean().exp().item() / RHO - 1)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("seed", range(4))
def test_radius_of_a_known_map_at_50_products(name, seed):
    assert mean_log_error(MAPS[name](SIZE, seed), 50, seed=seed) < BARS[name]


@pytest.mark.parametrize("name", MAPS)
def test_radius_of_a_known_map_at_500_products(name):
    assert mean_log_error(MAPS[name](SIZE, 7), 500) < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_radius_needs_no_particular_product(method):
    for name, bar in BARS.items():
        assert mean_log_error(MAPS[name](SIZE, 0), 50, method) < bar


def test_non_normal_oracle_is_one():
    assert torch.linalg.matrix_norm(non_normal(SIZE, 0), 2) > 4 * RHO


def test_plain_mean_of_growth_is_what_few_products_give():
    """Below four products after the burn-in there is no span to look at."""
    matrix = defective(SIZE, 0)
    states = torch.zeros(STARTS, SIZE, dtype=torch.float64)
    found = spectral_radius(apply(matrix), states, generator=generator(), num_products=12, burn_in=9, method="jvp")
    vector = random_unit(states, None, generator())
    lengths = [(vector @ torch.linalg.matrix_power(matrix.T, k)).norm(dim=1) for k in (9, 12)]
    torch.testing.assert_close(found, (lengths[1] / lengths[0]) ** (1 / 3))


@pytest.mark.parametrize("burn_in", [-1, 5, 6])
def test_burn_in_leaves_a_product(burn_in):
    with pytest.raises(ValueError, match=rf"`burn_in` must be in \[0, `num_products`\), got {burn_in} of 5"):
        spectral_radius(lambda h: h, torch.ones(1, 2), generator=generator(), num_products=5, burn_in=burn_in)


@pytest.mark.parametrize("num_products", [1, 2, 3, 5, 8, 50])
def test_radius_of_a_multiple_of_the_identity_is_exact(num_products):
    found = spectral_radius(lambda h: 0.7 * h, torch.ones(2, 3), generator=generator(), num_products=num_products)
    torch.testing.assert_close(found, torch.full((2,), 0.7), rtol=1e-3, atol=0)


def test_a_map_to_zero_has_radius_zero():
    found = spectral_radius(lambda h: 0 * h, torch.ones(2, 3), generator=generator(), method="jvp")
    assert found.tolist() == [0.0, 0.0]


def test_sequences_do_not_spoil_one_another():
    """A sequence that overflows has no radius; its neighbours keep theirs."""
    scales = torch.tensor([[0.5], [float("inf")], [0.25]])
    found = spectral_radius(lambda h: scales * h, torch.ones(3, 2), generator=generator(), method="jvp")
    assert found[[0, 2]].tolist() == pytest.approx([0.5, 0.25])
    assert not math.isfinite(found[1])


def test_every_sequence_of_a_batch_gets_its_own_value():
    matrices = torch.stack([MAPS[name](8, 3) * factor for name, factor in zip(MAPS, (1, 2, 3, 4, 5), strict=True)])

    def step(h):
        return torch.einsum("bij,bj->bi", matrices, h)

    states = torch.zeros(5, 8, dtype=torch.float64)
    radii = spectral_radius(step, states, generator=generator(), num_products=200, method="jvp")
    norms = spectral_norm(step, states, generator=generator(), method="jvp")
    assert radii.tolist() == pytest.approx([RHO * factor for factor in (1, 2, 3, 4, 5)], rel=0.01)
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(matrices, 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_the_radius_is_that_of_the_leading_eigenvalue(method):
    """For a symmetric map the last growth factor's derivative is the eigenvalue's: dρ = xᵀ dJ x."""
    matrix = normal_map(8, 0).requires_grad_()
    states = torch.zeros(1, 8, dtype=torch.float64)
    radius = spectral_radius(apply(matrix), states, generator=generator(), num_products=200, method=method)
    (gradient,) = torch.autograd.grad(radius.sum(), matrix)
    values, vectors = torch.linalg.eigh(matrix.detach())
    leading = vectors[:, values.abs().argmax()]
    torch.testing.assert_close(gradient, torch.outer(leading, leading), rtol=1e-4, atol=1e-4)


def test_gradient_of_the_norm_is_that_of_the_largest_singular_value():
    matrix = non_normal(8, 0).requires_grad_()
    states = torch.zeros(1, 8, dtype=torch.float64)
    norm = spectral_norm(apply(matrix), states, generator=generator(), num_iterations=200, method="jvp")
    (gradient,) = torch.autograd.grad(norm.sum(), matrix)
    left, _, right = torch.linalg.svd(matrix.detach())
    torch.testing.assert_close(gradient, torch.outer(left[:, 0], right[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("method", ["finite_difference", "jvp"])
def test_norm_of_a_known_map(name, method):
    matrix = MAPS[name](SIZE, 1)
    found = spectral_norm(
        apply(matrix), torch.zeros(4, SIZE, dtype=torch.float64), generator=generator(), method=method
    )
    expected = torch.linalg.matrix_norm(matrix, 2)
    torch.testing.assert_close(found, expected.expand(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_iterations", [1, 3, 10])
def test_norm_is_from_below_and_above_a_random_gain(num_iterations):
    matrix = non_normal(SIZE, 2)
    found = spectral_norm(
        apply(matrix),
        torch.zeros(8, SIZE, dtype=torch.float64),
        generator=generator(),
        num_iterations=num_iterations,
        method="jvp",
    )
    assert (found <= torch.linalg.matrix_norm(matrix, 2) * (1 + 1e-9)).all()
    assert (found**2 > matrix.square().sum() / SIZE).all()


def test_norm_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="`num_iterations` must be >= 1, got 0"):
        spectral_norm(lambda h: h, torch.ones(1, 2), generator=generator(), num_iterations=0)
    with pytest.raises(ValueError, match="needs `J v`, got `vjp`: use `finite_difference` or `jvp`"):
        spectral_norm(lambda h: h, torch.ones(1, 2), generator=generator(), method="vjp")
    with pytest.raises(ValueError, match=r"`method` must be one of \['finite_difference', 'jvp', 'vjp'\], got 'jpv'"):
        mean_gain(lambda h: h, torch.ones(1, 2), generator=generator(), method="jpv")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use `jvp`, `finite_difference` or no_grad"):
        spectral_norm(lambda h: h, torch.ones(1, 2), generator=generator())


@pytest.mark.parametrize("method", METHODS)
def test_mean_gain_is_the_mean_square_of_singular_values(method):
    matrix = non_normal(SIZE, 0)
    states = torch.zeros(2000, SIZE, dtype=torch.float64)
    estimate = mean_gain(apply(matrix), states, generator=generator(), num_samples=4, method=method)
    expected = matrix.square().sum() / SIZE
    error = estimate.value.std() / 2000**0.5
    assert abs(estimate.value.mean() - expected) < 4 * error < 0.1 * expected


def test_standard_error_of_the_mean_gain_is_honest():
    """Its square is on average the variance of the estimates over many repetitions."""
    matrix = non_normal(SIZE, 0)
    states = torch.zeros(4000, SIZE, dtype=torch.float64)
    estimate = mean_gain(apply(matrix), states, generator=generator(), num_samples=6, method="jvp")
    assert (estimate.standard_error**2).mean().sqrt().item() == pytest.approx(estimate.value.std().item(), rel=0.05)


def test_mean_gain_needs_two_draws_for_its_error():
    with pytest.raises(ValueError, match="`num_samples` must be >= 2, got 1"):
        mean_gain(lambda h: h, torch.ones(1, 2), generator=generator(), num_samples=1)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("norm_placement", PLACEMENTS)
def test_estimates_of_a_transformer_equal_dense_algebra_at_real_positions(norm_placement, padding):
    mask = MASKS[padding]
    model, state = transformer(norm_placement, mask=mask)
    step_fn = step_function(model, state)
    dense = dense_jacobians(step_fn, state.hidden, mask)
    radii = torch.stack([torch.linalg.eigvals(j).abs().max() for j in dense])
    norms = torch.stack([torch.linalg.svdvals(j)[0] for j in dense])
    found = spectral_radius(step_fn, state.hidden, generator=generator(), mask=mask, num_products=200)
    torch.testing.assert_close(found, radii, rtol=0.02, atol=0)
    found = spectral_norm(step_fn, state.hidden, generator=generator(), mask=mask)
    torch.testing.assert_close(found, norms, rtol=1e-3, atol=0)
    estimate = mean_gain(step_fn, state.hidden, generator=generator(), mask=mask, num_samples=300)
    gains = torch.stack([j.square().sum() / len(j) for j in dense])
    assert ((estimate.value - gains).abs() < 4.5 * estimate.standard_error).all()


def test_estimates_depend_on_the_generator_alone():
    model, state = transformer("sandwich_dual")
    step_fn = step_function(model, state)
    for estimate in (spectral_radius, spectral_norm):
        first = estimate(step_fn, state.hidden, generator=generator(3))
        torch.manual_seed(99)
        assert torch.equal(estimate(step_fn, state.hidden, generator=generator(3)), first)


def test_the_parts_of_a_dict_are_one_state():
    """A map that swaps two parts: each alone would look like zero."""
    states = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(2, 3, dtype=torch.float64)}

    def swap(h):
        return {"a": 0.5 * h["b"], "b": 2.0 * h["a"]}

    radius = spectral_radius(swap, states, generator=generator(), method="jvp")
    norm = spectral_norm(swap, states, generator=generator(), method="jvp")
    assert radius.tolist() == pytest.approx([1.0, 1.0])  # eigenvalues ±√(0.5 · 2)
    assert norm.tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["finite_difference", "jvp"])
def test_an_estimate_of_64_sequences_costs_little_more_than_its_products(method):
    """Against the same number of products of the whole batch in a bare loop."""
    from looplm.config import LoopedConfig
    from looplm.model import LoopedTransformer

    torch.manual_seed(0)
    config = LoopedConfig(vocab_size=17, max_positions=16, width=128, num_heads=4, ffn_width=256, dropout=0.0)
    model = LoopedTransformer(config)
    with torch.no_grad():
        state = model.step(model.embed(torch.randint(17, (64, 16))))

    def step_fn(hidden):
        return model.step(LoopState(hidden, state.context)).hidden

    @torch.no_grad()
    def bare():
        vector = normal(64, 16, 128, draw=generator()).float()
        for _ in range(50):
            vector = PRODUCTS[method](step_fn, state.hidden, vector)
            vector = vector / vector.norm()

    @torch.no_grad()
    def estimated():
        spectral_radius(step_fn, state.hidden, generator=generator(), num_products=50, method=method)

    def seconds(run):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    bare(), estimated()
    ratios = sorted(seconds(estimated) / seconds(bare) for _ in range(5))
    assert ratios[2] < 1.3, ratios
