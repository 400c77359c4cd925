import copy
import warnings
from typing import get_args

import pytest
import torch
from torch.overrides import TorchFunctionMode

from looplm.config import LoopedConfig, NormPlacement
from looplm.layers import Attention, Block, FeedForward, Norm, rotary_angles, rotate_half_split

WIDTH, HEADS, LENGTH = 8, 4, 5


def config(**changes):
    defaults = {"vocab_size": 11, "max_positions": 8, "width": WIDTH, "num_heads": HEADS, "ffn_width": 12}
    return LoopedConfig(**{**defaults, "dropout": 0.0, **changes})


def randomised(module, seed=0):
    """All parameters random: at their initial 0 and 1 biases and gains would hide their part."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module.double().eval()


@pytest.fixture
def x():
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm", "simple_norm"])
def test_norm_equals_its_formula(norm_type, x):
    norm = randomised(Norm(config(norm_type=norm_type, norm_eps=0.3)))
    centred = x if norm_type == "rms_norm" else x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 0.3).sqrt()
    if norm_type != "simple_norm":
        expected = expected * norm.weight
    if norm_type == "layer_norm":
        expected = expected + norm.bias
    torch.testing.assert_close(norm(x), expected)
    assert len(list(norm.parameters())) == {"layer_norm": 2, "rms_norm": 1, "simple_norm": 0}[norm_type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_in_half_precision_rounds_before_the_gain(dtype):
    norm = randomised(Norm(config(norm_type="rms_norm", norm_eps=1e-6))).to(dtype)
    x = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = x.float()
    expected = norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    assert torch.equal(norm(x), expected)
    once = torch.nn.functional.rms_norm(x, (WIDTH,), norm.weight, 1e-6)
    assert not torch.equal(norm(x), once)  # what a fused kernel gives


def test_rms_norm_under_autocast_is_that_of_the_wider_weights():
    # The branch of a sandwich block comes in bfloat16, the gain is float32.
    norm = Norm(config(norm_type="rms_norm"))
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it has no fused kernel
        assert torch.equal(norm(x), norm(x.float()))


class AttentionDtypes(TorchFunctionMode):
    """Notes the type in which attention is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_short_rows_of_bfloat16_are_attended_to_in_float32_where_a_cpu_differentiates(autocast):
    torch.manual_seed(0)
    wide = Attention(config())
    x = torch.randn(2, LENGTH, WIDTH)
    narrow = wide if autocast else copy.deepcopy(wide).bfloat16()
    y = x if autocast else x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), AttentionDtypes() as trained:
        output = narrow(y, None, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), AttentionDtypes() as evaluated, torch.no_grad():
        narrow(y, None, None)
    assert (trained.seen, evaluated.seen, output.dtype) == ([torch.float32], [torch.bfloat16], torch.bfloat16)
    (expected,) = torch.autograd.grad(wide(x, None, None).sum(), wide.qkv.weight)
    (found,) = torch.autograd.grad(output.sum(), narrow.qkv.weight)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("placement", get_args(NormPlacement))
@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm", "simple_norm"])
def test_block_equals_the_papers_formula(placement, norm_type, x):
    block = randomised(Block(config(norm_placement=placement, norm_type=norm_type)))
    sub_layers = [
        (lambda u: block.attention(u, None, None), block.attention_norm, block.attention_out_norm),
        (block.ffn, block.ffn_norm, block.ffn_out_norm),
    ]
    expected = x
    for f, inner, outer in sub_layers:
        expected = {
            "pre_norm": lambda u, f=f, n1=inner: u + f(n1(u)),
            "post_norm": lambda u, f=f, n2=outer: n2(u + f(u)),
            "sandwich_branch": lambda u, f=f, n1=inner, n2=outer: u + n2(f(n1(u))),
            "sandwich_dual": lambda u, f=f, n1=inner, n2=outer: n2(u + f(n1(u))),
        }[placement](expected)
    torch.testing.assert_close(block(x), expected)
    num_norms = sum(isinstance(module, Norm) for module in block.modules())
    assert num_norms == (2 if placement in ("pre_norm", "post_norm") else 4)


def test_deepnorm_scales_the_residual_stream(x):
    block = randomised(Block(config(norm_placement="post_norm", deepnorm_alpha=1.7)))
    first = block.attention_out_norm(1.7 * x + block.attention(x, None, None))
    torch.testing.assert_close(block(x), block.ffn_out_norm(1.7 * first + block.ffn(first)))


def reference_attention(attention, x, visible, num_kv_heads):
    """One head and one query at a time; query head h reads key/value head h // group."""
    head_width, group = WIDTH // HEADS, HEADS // num_kv_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q, k, v = (x @ weight.T + bias).split([WIDTH, num_kv_heads * head_width, num_kv_heads * head_width], -1)
    mixed = torch.zeros_like(x)
    for head in range(HEADS):
        mine = slice(head * head_width, (head + 1) * head_width)
        shared = slice(head // group * head_width, (head // group + 1) * head_width)
        for sample in range(x.shape[0]):
            for i in range(x.shape[1]):
                seen = visible[sample, i].nonzero().flatten()
                scores = k[sample, seen, shared] @ q[sample, i, mine] / head_width**0.5
                mixed[sample, i, mine] = scores.softmax(0) @ v[sample, seen, shared]
    return mixed @ attention.out.weight.T + attention.out.bias


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_a_loop_over_heads_and_queries(num_kv_heads, masked, x):
    attention = randomised(Attention(config(num_kv_heads=num_kv_heads)))
    visible = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool).tril()
    if masked:
        visible[0, 2:, :2] = False
    expected = reference_attention(attention, x, visible, num_kv_heads)
    torch.testing.assert_close(attention(x, visible[:, None] if masked else None, None), expected)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_feed_forward_equals_its_formula(activation, x):
    ffn = randomised(FeedForward(config(activation=activation)))
    up = x @ ffn.up.weight.T + ffn.up.bias
    if activation == "gelu":
        hidden = up * 0.5 * (1 + torch.erf(up / 2**0.5))
    else:
        gate = x @ ffn.gate.weight.T + ffn.gate.bias
        hidden = gate * gate.sigmoid() * up
    torch.testing.assert_close(ffn(x), hidden @ ffn.down.weight.T + ffn.down.bias)


def test_rotation_is_multiplication_by_a_complex_phase(x):
    heads = x.view(2, LENGTH, 2, 4).transpose(1, 2)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    turned = rotate_half_split(heads, *rotary_angles(positions, head_width=4, theta=100.0))
    frequencies = torch.tensor([1.0, 0.1], dtype=torch.float64)  # θ^(−2j/d)
    phase = torch.exp(1j * positions[:, None, :, None] * frequencies)
    expected = torch.complex(heads[..., :2], heads[..., 2:]) * phase
    # Angles are float32.
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1), rtol=1e-6, atol=1e-6)


def test_rotary_scores_depend_on_relative_positions_only(x):
    q, k = x[:, None], x.flip(0)[:, None]

    def scores(shift):
        rotary = rotary_angles(torch.arange(shift, shift + LENGTH)[None], WIDTH, 10_000.0)
        return rotate_half_split(q, *rotary) @ rotate_half_split(k, *rotary).mT

    torch.testing.assert_close(scores(0), scores(17), rtol=1e-5, atol=1e-5)


def test_bias_free_blocks_have_no_biases_in_their_linear_maps():
    names = [name for name, _ in Block(config(use_bias=False)).named_parameters() if name.endswith("bias")]
    assert names
    assert all("norm" in name for name in names)


@pytest.mark.parametrize("part", [Attention, FeedForward, Block])
def test_dropout_acts_in_training_only(part, x):
    module = randomised(part(config(dropout=0.5)))
    extra = () if part is FeedForward else (None, None)
    torch.testing.assert_close(module(x, *extra), module(x, *extra), rtol=0, atol=0)
    module.train()
    # The MLP has no dropout of its own: the block drops its branch as a whole.
    assert torch.equal(module(x, *extra), module(x, *extra)) == (part is FeedForward)


def test_branch_dropout_keeps_the_mean_of_the_branch(x):
    block = randomised(Block(config(norm_placement="pre_norm", dropout=0.25)))
    block.attention.dropout = 0.0
    torch.nn.init.zeros_(block.ffn.down.weight)
    torch.nn.init.zeros_(block.ffn.down.bias)
    branch = block(x) - x
    block.train()
    torch.manual_seed(0)
    ratio = (block(x) - x) / branch
    kept = ratio.abs() > 1e-9
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75))
    assert 0.5 < kept.double().mean() < 0.95
