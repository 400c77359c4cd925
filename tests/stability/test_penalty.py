import itertools

import pytest
import torch

from looplm.config import LoopedConfig
from looplm.loop import LoopState
from looplm.model import LoopedTransformer
from looplm.stability.penalty import JacobianPenalty, LastStepPenalty, StarsReleasePenalty
from looplm.stability.vectors import random_unit

BATCH, LENGTH, WIDTH = 3, 4, 8
METHODS = ["jvp", "finite_difference"]
MASKS = {
    "unpadded": None,
    "left": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]),
    "right": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]),
}
every_block = pytest.mark.parametrize(
    ("norm_placement", "norm_type"),
    list(
        itertools.product(
            ["pre_norm", "post_norm", "sandwich_branch", "sandwich_dual"], ["layer_norm", "rms_norm", "simple_norm"]
        )
    ),
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(norm_placement="sandwich_dual", norm_type="layer_norm", mask=None, batch=BATCH, **changes):
    """A tiny model, its step as a function of the latent state, and the state after two loops."""
    torch.manual_seed(0)
    config = LoopedConfig(
        vocab_size=7,
        max_positions=LENGTH,
        width=WIDTH,
        num_heads=2,
        ffn_width=12,
        norm_placement=norm_placement,
        norm_type=norm_type,
        input_injection="linear",
        init_std=0.5,
        dropout=0.0,
        **changes,
    )
    model = LoopedTransformer(config).double()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # at 1 and 0 gains and biases would hide their part
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    tokens = torch.randint(7, (BATCH, LENGTH), generator=generator(1)).repeat(batch // BATCH, 1)
    with torch.no_grad():
        state = model.step(model.step(model.embed(tokens, mask)))

    def step_fn(hidden):
        return model.step(LoopState(hidden, state.context)).hidden

    return model, step_fn, state.hidden


def dense_jacobians(step_fn, hidden, mask):
    """J⁽ⁱ⁾ of each sequence, ``(n_i, n_i)``, restricted to its real positions."""
    # Sequences do not interact, so the sum over the batch keeps every sequence's own Jacobian apart.
    full = torch.autograd.functional.jacobian(lambda h: step_fn(h).sum(0), hidden)  # (T, D, B, T, D)
    mask = torch.ones(hidden.shape[:2]) if mask is None else mask
    rows = [row.repeat_interleave(WIDTH).bool() for row in mask]
    blocks = full.permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)
    return [block[row][:, row] for block, row in zip(blocks, rows, strict=True)]


def test_sequences_do_not_interact():
    _, step_fn, hidden = build()
    full = torch.autograd.functional.jacobian(step_fn, hidden)
    across = [full[i, :, :, j].abs().max() for i, j in itertools.permutations(range(BATCH), 2)]
    assert max(across) == 0


@every_block
@pytest.mark.parametrize("padding", MASKS)
def test_penalty_equals_the_dense_jacobian_at_real_positions(norm_placement, norm_type, padding):
    mask = MASKS[padding]
    _, step_fn, hidden = build(norm_placement, norm_type, mask)
    vectors = random_unit(hidden, mask, generator(3))
    real = torch.ones(hidden.shape[:2]) if mask is None else mask
    gains = [
        (jacobian @ vector[row.bool()].flatten()).square().sum()
        for jacobian, vector, row in zip(dense_jacobians(step_fn, hidden, mask), vectors, real, strict=True)
    ]
    expected = torch.stack(gains).mean().item()
    for method in METHODS:
        value = JacobianPenalty(method=method)(step_fn, hidden, hidden, mask, generator(3)).item()
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", MASKS)
def test_penalty_is_the_mean_square_gain_in_expectation(method, padding):
    """Over v: mean tr(G)/n and variance 2(n·tr(G²) − tr(G)²) / (n²(n + 2)), with G = JᵀJ."""
    mask, copies = MASKS[padding], 2000
    _, step_fn, hidden = build(mask=mask)
    means, variances = [], []
    for jacobian in dense_jacobians(step_fn, hidden, mask):
        gram, n = jacobian.T @ jacobian, len(jacobian)
        means.append(gram.trace() / n)
        variances.append(2 * (n * (gram @ gram).trace() - gram.trace() ** 2) / (n**2 * (n + 2)))
    many = None if mask is None else mask.repeat(copies, 1)
    _, step_fn, hidden = build(mask=many, batch=copies * BATCH)
    value = JacobianPenalty(method=method)(step_fn, hidden, hidden, many, generator()).item()
    error = (sum(variances) / copies).sqrt() / BATCH
    assert abs(value - sum(means) / BATCH) < 4 * error
    # The test can tell the mean-square gain from its neighbours, such as the squared norm without 1/n.
    assert error < 0.05 * sum(means) / BATCH


@every_block
@pytest.mark.parametrize("method", METHODS)
def test_gradient_equals_numerical_differentiation(norm_placement, norm_type, method):
    model, step_fn, hidden = build(norm_placement, norm_type, MASKS["left"])
    parameters = [*model.core.parameters(), *model.injection.parameters()]

    def value(by=method):
        return JacobianPenalty(method=by)(step_fn, hidden, hidden, MASKS["left"], generator(3))

    gradients = torch.autograd.grad(value(), parameters, materialize_grads=True)
    draw = generator(9)
    for _ in range(2):
        directions = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
        values, eps = {}, 1e-4
        with torch.no_grad():
            for shift in (-2, -1, 1, 2):
                torch._foreach_add_(parameters, directions, alpha=shift * eps)
                # The exact product's value, so that a consistent error of the other would show.
                values[shift] = value("jvp").item()
                torch._foreach_add_(parameters, directions, alpha=-shift * eps)
        truth = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * eps)
        assert slope == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_reaches_the_parameters_but_not_the_trajectory(method):
    model, step_fn, hidden = build()
    hidden.requires_grad_()
    JacobianPenalty(method=method)(step_fn, hidden, hidden, None, generator()).backward()
    assert hidden.grad is None
    assert all(p.grad.abs().max() > 0 for name, p in model.core.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("method", METHODS)
def test_each_sequence_has_its_own_vector(method):
    """One vector for a whole batch would weigh the sequences by its share in each."""
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None]
    hidden = torch.randn(3, 4, 5, generator=generator(), dtype=torch.float64)
    value = JacobianPenalty(method=method)(lambda h: scales * h, hidden, hidden, None, generator())
    assert value.item() == pytest.approx((1 + 4 + 9) / 3)


@pytest.mark.parametrize("method", METHODS)
def test_contents_of_padded_positions_do_not_matter(method):
    mask = MASKS["right"]
    _, step_fn, hidden = build(mask=mask)
    noisy = torch.where(mask[..., None].bool(), hidden, torch.randn(hidden.shape, generator=generator()).double())
    values = [JacobianPenalty(method=method)(step_fn, h, h, mask, generator(3)).item() for h in (hidden, noisy)]
    assert values[0] == pytest.approx(values[1], rel=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_degenerate_sequences_give_finite_values_and_gradients(method, size):
    """A state at the origin, and a sequence of nothing but padding, in float32."""
    hidden = size * torch.ones(2, LENGTH, WIDTH)
    mask = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])
    weight = torch.eye(WIDTH).requires_grad_()
    value = JacobianPenalty(method=method)(lambda h: h @ weight, hidden, hidden, mask, generator())
    assert value.item() == pytest.approx(1 / 2, rel=1e-3)  # the padded sequence has gain 0
    (gradient,) = torch.autograd.grad(value, weight)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_penalty_takes_dict_states(method):
    hidden = {"tokens": torch.ones(2, 3, 2).double(), "memory": torch.ones(2, 5).double()}
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    value = JacobianPenalty(method=method)(
        lambda h: {name: 0.5 * part for name, part in h.items()}, hidden, hidden, mask, generator()
    )
    assert value.item() == pytest.approx(0.25)


def test_unknown_method_and_empty_fraction_are_refused():
    with pytest.raises(ValueError, match=r"`method` must be one of .*, got 'reverse'"):
        JacobianPenalty(method="reverse")
    for fraction in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"`fraction` must be in \(0, 1\], got {fraction}"):
            JacobianPenalty(fraction=fraction)


def last_step(hidden, previous, mask=None):
    return LastStepPenalty()(lambda h: h, hidden, previous, mask, generator())


@pytest.mark.parametrize("padding", MASKS)
def test_last_step_is_the_mean_distance_over_real_positions(padding):
    mask = MASKS[padding]
    now, before = (torch.randn(BATCH, LENGTH, WIDTH, generator=generator(seed)).requires_grad_() for seed in (0, 1))
    real = torch.ones(BATCH, LENGTH) if mask is None else mask
    distances = [
        torch.dist(now[i, j], before[i, j]) for i, j in itertools.product(range(BATCH), range(LENGTH)) if real[i, j]
    ]
    expected = torch.stack(distances).mean()
    value = last_step(now, before, mask)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, (now, before)), torch.autograd.grad(expected, (now, before)))


def test_last_step_has_finite_gradient_where_the_state_stands_still():
    before = torch.randn(2, LENGTH, WIDTH, generator=generator())
    now = before.clone().requires_grad_()
    moved = torch.zeros(2, LENGTH, WIDTH)
    moved[1, 2, 0] = 3.0
    value = last_step(now + moved, before)
    assert value.item() == pytest.approx(3 / (2 * LENGTH), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, now)
    torch.testing.assert_close(gradient, moved / 3 / (2 * LENGTH))


def test_last_step_takes_dict_states_and_fully_padded_batches():
    before = {"tokens": torch.zeros(2, 3, 2), "memory": torch.zeros(2, 4)}
    now = {"memory": torch.ones(2, 4), "tokens": torch.full((2, 3, 2), 5.0)}
    mask = torch.tensor([[1, 0, 0], [0, 0, 1]])
    expected = (2 * 5 * 2**0.5 + 2 * 2) / 4  # two real positions and two parts without positions
    assert last_step(now, before, mask).item() == pytest.approx(expected)
    assert last_step(now["tokens"], before["tokens"], torch.zeros(2, 3)).item() == 0


# Quantities beyond the paper's


def test_release_penalty_is_one_batch_wide_vector_through_the_transposed_jacobian() -> None:
    hidden = torch.randn(3, 5, dtype=torch.float64)
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def step_fn(h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h @ weight.T)

    value = StarsReleasePenalty()(step_fn, hidden, hidden, None, torch.Generator().manual_seed(5))
    v = torch.randn(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    v = v / v.norm()
    state = hidden.clone().requires_grad_()
    (product,) = torch.autograd.grad(step_fn(state), state, v, create_graph=True)
    torch.testing.assert_close(value, product.square().sum())
    (ours,) = torch.autograd.grad(value, weight, retain_graph=True)
    (plain,) = torch.autograd.grad(product.square().sum(), weight)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("quantity", "expected"), [("spectral_radius", 0.8), ("spectral_norm", 0.8)])
def test_a_hinge_penalises_only_what_exceeds_the_target(quantity: str, expected: float) -> None:
    gains = torch.tensor([[0.8, 0.1], [0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(2, 2, dtype=torch.float64)

    def measure(target: float) -> torch.Tensor:
        penalty = JacobianPenalty(quantity=quantity, method="jvp", num_iterations=60, target=target)  # type: ignore[arg-type]
        return penalty(lambda h: h * gains, hidden, hidden, None, torch.Generator().manual_seed(0))

    assert measure(0.0).item() == pytest.approx((expected + 0.3) / 2, rel=1e-6)
    above = measure(0.5)
    assert above.item() == pytest.approx((expected - 0.5) / 2, rel=1e-6)
    above.backward()
    assert gains.grad is not None
    # d/dg of (g − 0.5)/2 at the one direction above the target, nothing elsewhere
    torch.testing.assert_close(
        gains.grad, torch.tensor([[0.5, 0.0], [0.0, 0.0]], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert measure(0.9).item() == 0.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"quantity": "trace"}, "quantity"),
        ({"num_iterations": 3}, "num_iterations"),
        ({"quantity": "spectral_radius"}, "num_iterations"),
        ({"target": -1.0}, "target"),
    ],
)
def test_a_setting_out_of_range_or_without_effect_is_an_error(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"`{named}`"):
        JacobianPenalty(**arguments)
