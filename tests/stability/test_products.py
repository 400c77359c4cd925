import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from looplm.stability.products import finite_difference, jvp, product_named, vjp

BATCH, LENGTH, WIDTH = 3, 4, 6
both_products = pytest.mark.parametrize("product", [jvp, finite_difference])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_product(step_fn, hidden, vector):
    """J v of each sequence, with J assembled row by row in reverse mode."""
    rows = []
    for h, v in zip(hidden, vector, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: step_fn(x[None])[0], h)
        rows.append(torch.tensordot(jacobian, v, dims=v.ndim))
    return torch.stack(rows)


def attention_step(dtype=torch.float64):
    """A post-norm block with torch's own norm and fused attention."""
    torch.manual_seed(0)
    qkv, norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight)
    module = nn.ModuleList([qkv, norm]).to(dtype)

    def step(h):
        q, k, v = (x.unflatten(-1, (2, 3)).transpose(1, 2) for x in qkv(h).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return norm(h + mixed.transpose(1, 2).flatten(-2))

    return step, module


@both_products
def test_product_equals_the_dense_jacobian(product):
    step, _ = attention_step()
    h, v = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH, seed=1)
    torch.testing.assert_close(product(step, h, v), dense_product(step, h, v), rtol=1e-7, atol=1e-8)


@both_products
def test_dict_states_are_one_vector(product):
    weight = normal(7, 7)

    def flat_step(x):
        return torch.tanh(x @ weight)

    def step(h):
        out = flat_step(torch.cat([h["tokens"].flatten(1), h["memory"]], 1))
        # The parts come back in another order.
        return {"memory": out[:, 4:], "tokens": out[:, :4].unflatten(1, (2, 2))}

    h = {"tokens": normal(BATCH, 2, 2), "memory": normal(BATCH, 3, seed=1)}
    v = {"tokens": normal(BATCH, 2, 2, seed=2), "memory": normal(BATCH, 3, seed=3)}
    flat_h, flat_v = (torch.cat([x["tokens"].flatten(1), x["memory"]], 1) for x in (h, v))
    expected = dense_product(flat_step, flat_h, flat_v)
    product_v = product(step, h, v)
    torch.testing.assert_close(product_v["tokens"].flatten(1), expected[:, :4], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(product_v["memory"], expected[:, 4:], rtol=1e-8, atol=1e-9)


@both_products
def test_gradient_with_respect_to_parameters_equals_the_closed_form(product):
    weight = normal(WIDTH, WIDTH).requires_grad_()
    h, v = normal(BATCH, WIDTH, seed=1), normal(BATCH, WIDTH, seed=2)
    closed_form = (1 - torch.tanh(h @ weight).square()) * (v @ weight)
    (expected,) = torch.autograd.grad(closed_form.square().sum(), weight)
    product_v = product(lambda x: torch.tanh(x @ weight), h, v)
    (gradient,) = torch.autograd.grad(product_v.square().sum(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


def directional_derivative(function, parameters, directions, eps=1e-3):
    """Five-point central difference: error of order eps⁴."""

    def at(shift):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=shift)
        value = function().item()
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=shift)
        return value

    return (8 * (at(eps) - at(-eps)) - (at(2 * eps) - at(-2 * eps))) / (12 * eps)


def test_jvp_corrects_the_gradient_that_pytorch_gets_wrong_through_layer_norm():
    step, module = attention_step()
    h, v = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH, seed=1)
    parameters = list(module.parameters())
    directions = [normal(*p.shape, seed=i) for i, p in enumerate(parameters)]

    def plain_jvp():
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(step, (h,), (v,))[1]

    torch.testing.assert_close(jvp(step, h, v), plain_jvp())
    errors = {}
    for name, product in {"ours": lambda: jvp(step, h, v), "plain": plain_jvp}.items():
        gradients = torch.autograd.grad(product().square().sum(), parameters, materialize_grads=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
        truth = directional_derivative(lambda p=product: p().square().sum(), parameters, directions)
        errors[name] = abs(slope / truth - 1)
    assert errors["ours"] < 1e-6
    assert errors["plain"] > 0.01, (
        f"torch {torch.__version__} differentiates forward-mode AD of LayerNorm correctly (pytorch issue 196700): "
        "the replacement of norms in looplm.stability.products.jvp may go."
    )


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.LayerNorm((LENGTH, WIDTH)),
        nn.LayerNorm(WIDTH, bias=False, eps=0.1),
        nn.RMSNorm(WIDTH),
        nn.RMSNorm((LENGTH, WIDTH), eps=0.1),
        nn.RMSNorm(WIDTH, elementwise_affine=False),
        nn.GroupNorm(2, LENGTH),
        lambda x: torch.layer_norm(x, [WIDTH], eps=0.2),
        lambda x: torch.rms_norm(x, [WIDTH], eps=0.2),
        lambda x: F.layer_norm(input=x, normalized_shape=(WIDTH,), eps=0.2),
    ],
    ids=lambda norm: str(norm).split(" at 0x")[0],  # an address is another one in every process
)
def test_jvp_and_its_gradient_are_right_for_every_way_to_call_a_norm(norm):
    if isinstance(norm, nn.Module):
        norm = norm.double()
    weight = normal(WIDTH, WIDTH, seed=3).requires_grad_()
    h, v = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH, seed=1)

    def step(x):
        return torch.tanh(norm(x @ weight))

    torch.testing.assert_close(jvp(step, h, v), dense_product(step, h, v))
    slope = (torch.autograd.grad(jvp(step, h, v).square().sum(), weight)[0] * weight).sum().item()
    direction = [weight.detach().clone()]
    truth = directional_derivative(lambda: dense_product(step, h, v).square().sum(), [weight], direction)
    assert slope == pytest.approx(truth, rel=1e-6, abs=1e-8)


def test_jvp_goes_through_fused_attention_and_leaves_it_on():
    step, _ = attention_step(torch.float32)
    h, v = (normal(BATCH, LENGTH, WIDTH, seed=seed, dtype=torch.float32) for seed in (0, 1))
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(step, (h,), (v,))
    torch.testing.assert_close(jvp(step, h, v), dense_product(step, h, v))
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(step, (h,), (v,))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both_products
def test_products_work_where_gradients_are_off(product, mode):
    step, _ = attention_step()
    h, v = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH, seed=1)
    expected = dense_product(step, h, v)
    with mode():
        torch.testing.assert_close(product(step, h.clone(), v.clone()), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_finite_difference_has_float32_precision_under_autocast(autocast, state_dtype):
    step, module = attention_step(torch.float32)
    h, v = (normal(BATCH, LENGTH, WIDTH, seed=seed).to(state_dtype) for seed in (0, 1))
    expected = dense_product(step, h.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        product_v = finite_difference(step, h, v)
        assert (module[0](h.float()).dtype == torch.bfloat16) == autocast
    assert product_v.dtype == torch.float32
    assert (product_v - expected).norm() < 1e-4 * expected.norm()


def test_jvp_under_autocast_is_right_to_the_precision_of_bfloat16():
    step, _ = attention_step(torch.float32)
    h, v = (normal(BATCH, LENGTH, WIDTH, seed=seed, dtype=torch.float32) for seed in (0, 1))
    expected = dense_product(step, h, v)
    with torch.autocast("cpu", torch.bfloat16):
        product_v = jvp(step, h, v)
    assert (product_v - expected).norm() < 2e-2 * expected.norm()


def test_finite_difference_fits_its_step_to_each_sequence():
    """States and vectors whose sizes differ by orders of magnitude, in float32."""
    size = torch.tensor([1e-4, 1.0, 1e4])[:, None]
    h = normal(BATCH, WIDTH, dtype=torch.float32) * size
    v = normal(BATCH, WIDTH, seed=1, dtype=torch.float32) * size.flip(0)

    relative = torch.tanh(h / size)
    expected = (relative + h / size * (1 - relative.square())) * v
    product_v = finite_difference(lambda x: x * torch.tanh(x / size), h, v)
    assert ((product_v - expected).norm(dim=1) < 1e-4 * expected.norm(dim=1)).all()


def test_finite_difference_of_a_dict_is_as_coarse_as_its_coarsest_part():
    h = {"a": normal(BATCH, WIDTH), "b": normal(BATCH, WIDTH, seed=1, dtype=torch.float32)}
    v = {"a": normal(BATCH, WIDTH, seed=2), "b": normal(BATCH, WIDTH, seed=3, dtype=torch.float32)}
    product_v = finite_difference(lambda x: {name: part.square() for name, part in x.items()}, h, v)
    for name in h:
        expected = 2 * h[name] * v[name]
        assert (product_v[name] - expected).norm() < 3e-4 * expected.norm()


@both_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_and_vectors_of_no_length_give_finite_values(product, dtype):
    h = torch.stack([torch.zeros(WIDTH), torch.full((WIDTH,), 1e4), torch.zeros(WIDTH)]).to(dtype)
    v = torch.stack([torch.ones(WIDTH), torch.zeros(WIDTH), torch.zeros(WIDTH)]).to(dtype)
    h.requires_grad_()
    product_v = product(lambda x: 3 * torch.tanh(x), h, v)
    expected = torch.stack([torch.full((WIDTH,), 3.0), torch.zeros(WIDTH), torch.zeros(WIDTH)]).to(dtype)
    torch.testing.assert_close(product_v, expected, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(product_v.sum(), h)
    assert gradient.isfinite().all()


def dense_transposed_product(step_fn, hidden, vector):
    """Jᵀ u of each sequence, with J assembled row by row."""
    pulled = []
    for h, u in zip(hidden, vector, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: step_fn(x[None])[0], h)
        pulled.append(torch.tensordot(u, jacobian, dims=u.ndim))
    return torch.stack(pulled)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_vjp_equals_the_transposed_dense_jacobian(mode):
    step, _ = attention_step()
    h, u = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH, seed=1)
    expected = dense_transposed_product(step, h, u)
    with mode():
        torch.testing.assert_close(vjp(step, h, u), expected)


def test_vjp_of_a_dict_pairs_its_parts_by_name():
    h = {"a": normal(BATCH, 2), "b": normal(BATCH, 2, seed=1)}
    u = {"b": normal(BATCH, 2, seed=2), "a": normal(BATCH, 2, seed=3)}
    pulled = vjp(lambda x: {"a": 3 * x["b"], "b": x["a"] * x["b"]}, h, u)
    torch.testing.assert_close(pulled["a"], u["b"] * h["b"])
    torch.testing.assert_close(pulled["b"], 3 * u["a"] + u["b"] * h["a"])


def test_gradient_of_vjp_with_respect_to_parameters_is_right_through_fused_attention_and_norm():
    step, module = attention_step()
    h, u = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH, seed=1)
    parameters = list(module.parameters())
    directions = [normal(*p.shape, seed=i) for i, p in enumerate(parameters)]
    gradients = torch.autograd.grad(vjp(step, h, u).square().sum(), parameters, materialize_grads=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    truth = directional_derivative(lambda: dense_transposed_product(step, h, u).square().sum(), parameters, directions)
    assert slope == pytest.approx(truth, rel=1e-6)


def test_vjp_in_inference_mode_names_what_works_there():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use `jvp`, `finite_difference` or no_grad"):
        vjp(torch.tanh, normal(BATCH, WIDTH), normal(BATCH, WIDTH))


class _OnlyReverse(torch.autograd.Function):
    """x², by somebody who knows nothing of forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_jvp_without_a_forward_derivative_names_what_works():
    h, v = normal(BATCH, WIDTH), normal(BATCH, WIDTH, seed=1)
    with pytest.raises(
        NotImplementedError, match="`jvp` cannot go through this step: use `finite_difference` or `vjp`"
    ):
        jvp(_OnlyReverse.apply, h, v)
    for product in (finite_difference, vjp):
        torch.testing.assert_close(product(_OnlyReverse.apply, h, v), 2 * h * v, rtol=1e-8, atol=1e-9)


def test_vjp_without_a_second_derivative_says_so_at_once_and_names_what_works():
    def flash(x):
        heads = x.reshape(BATCH, 1, 1, WIDTH)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # the step insists on its kernel
            return F.scaled_dot_product_attention(heads, heads, heads).reshape(BATCH, WIDTH)

    h, u = normal(BATCH, WIDTH), normal(BATCH, WIDTH, seed=1)
    with pytest.raises(NotImplementedError, match=r"no second derivative .*use `finite_difference` or `jvp`"):
        vjp(flash, h, u)
    with torch.no_grad():
        assert vjp(flash, h, u).shape == h.shape
    assert finite_difference(flash, h, u).shape == h.shape


def test_finite_difference_with_bfloat16_weights_names_what_works():
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH).bfloat16()
    h, v = (normal(BATCH, WIDTH, seed=seed).bfloat16() for seed in (0, 1))
    with pytest.raises(RuntimeError, match="in float32, which this step refuses: use `jvp` or `vjp`"):
        finite_difference(linear, h, v)
    torch.testing.assert_close(jvp(linear, h, v), v @ linear.weight.T)


@both_products
def test_an_error_of_the_step_itself_is_not_covered_up(product):
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        product(lambda x: x @ torch.ones(3, 3, dtype=x.dtype), normal(BATCH, WIDTH), normal(BATCH, WIDTH))
    assert "use `" not in str(caught.value)


def test_products_have_names():
    assert [product_named(name) for name in ("finite_difference", "jvp", "vjp")] == [finite_difference, jvp, vjp]
    with pytest.raises(ValueError, match=r"one of \['finite_difference', 'jvp', 'vjp'\], got 'reverse'"):
        product_named("reverse")
