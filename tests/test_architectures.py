"""What Ouro, Huginn and Parcae have beyond the paper's model; parity with their weights is in test_checkpoints.py."""

import pytest
import torch
import torch.nn.functional as F

from looplm.config import LoopedConfig
from looplm.layers import rotary_angles, rotate_half_split, rotate_interleaved
from looplm.model import LoopedTransformer
from looplm.module import LoopLM

SIZE = {"vocab_size": 11, "max_positions": 40, "width": 8, "num_heads": 2, "ffn_width": 12, "dropout": 0.0}
TOKENS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))


def build(**changes):
    torch.manual_seed(0)
    model = LoopedTransformer(LoopedConfig(**{**SIZE, "init_std": 0.5, **changes})).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "log_rate", "raw_step")):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("config", "billions", "depth_free"),
    [(LoopedConfig.ouro_1_4b(), 1.43, 24), (LoopedConfig.huginn_3_5b(), 3.56, 8)],
)
def test_presets_have_the_published_sizes(config, billions, depth_free):
    with torch.device("meta"):
        model = LoopedTransformer(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert len(model.prelude) + len(model.core) + len(model.coda) == depth_free


def test_interleaved_rotation_is_the_half_split_one_of_permuted_features():
    x = torch.randn(2, 3, 5, 8)
    angles = rotary_angles(torch.arange(5)[None], 8, 100.0)
    permutation = torch.arange(8).reshape(4, 2).T.reshape(8)  # 0, 2, 4, 6, 1, 3, 5, 7
    expected = rotate_half_split(x[..., permutation], *angles)
    torch.testing.assert_close(rotate_interleaved(x, *angles)[..., permutation], expected)


def test_rotation_depends_on_distances_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    for rotate in (rotate_interleaved, rotate_half_split):
        products = []
        for shift in (0, 7):
            turned = [
                rotate(x, *rotary_angles(torch.tensor([[position + shift]]), 8, 50.0))
                for x, position in ((q, 5), (k, 2))
            ]
            products.append((turned[0] * turned[1]).sum())
        torch.testing.assert_close(*products, rtol=1e-6, atol=1e-6)


def test_diagonal_injection_equals_its_formula_and_contracts_whatever_its_parameters():
    model = build(input_injection="diagonal")
    injection = model.injection
    h, e = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    step = torch.log1p(injection.raw_step.exp())
    decay = torch.exp(-step * injection.log_rate.exp())
    torch.testing.assert_close(injection(h, e), decay * h + step * (e @ injection.input.weight.T))
    for scale in (-5.0, 0.0, 3.0):
        injection.log_rate.data.fill_(scale)
        injection.raw_step.data.fill_(scale)
        assert ((injection.decay() > 0) & (injection.decay() < 1)).all()


def test_loop_norm_starts_each_loop_from_the_normed_state_and_the_head_reads_it():
    model = build(loop_norm=True, norm_placement="sandwich_branch", tie_embeddings=False)
    h = model.token_embedding(TOKENS) + model.position_embedding(torch.arange(6))
    for num_loops in (1, 2, 3):
        h = model.final_norm(model.core[0](h))
        torch.testing.assert_close(model(TOKENS, num_loops=num_loops), h @ model.head.weight.T)


def test_coda_norm_stands_on_both_sides_of_the_coda():
    model = build(coda_norm=True, num_coda_layers=1, embedding_scale=3.0)
    h = 3.0 * (model.token_embedding(TOKENS) + model.position_embedding(torch.arange(6)))
    z = model.final_norm(model.coda[0](model.final_norm(model.core[0](h))))
    torch.testing.assert_close(model(TOKENS, num_loops=1), z @ model.token_embedding.weight.T)


def test_query_and_key_biases_act_before_the_rotation():
    changes = {"use_bias": False, "positions": "rotary", "rotary_pairs": "interleaved"}
    own = build(**changes, qk_bias=True).core[0].attention
    plain = build(**changes).core[0].attention
    plain.load_state_dict({name: value for name, value in own.state_dict().items() if "bias" not in name})
    # The same biases as those of the linear map.
    bias = torch.cat([own.q_bias.flatten(), own.k_bias.flatten(), torch.zeros(8)])
    plain.qkv.bias = torch.nn.Parameter(bias)
    x, angles = torch.randn(2, 6, 8, dtype=torch.float64), rotary_angles(torch.arange(6)[None], 4, 100.0)
    torch.testing.assert_close(own(x, None, angles), plain(x, None, angles))


def test_heads_may_be_wider_than_their_share():
    model = build(attention_head_width=6, num_kv_heads=1)
    assert model.core[0].attention.qkv.weight.shape == (12 + 6 + 6, 8)
    assert model(TOKENS, num_loops=2).shape == (3, 6, 11)


def test_exit_gate_is_a_linear_map_of_the_state_that_training_leaves_alone():
    model = build(exit_gate=True)
    state = model.step(model.embed(TOKENS))
    expected = F.linear(state.hidden, model.exit_gate.weight, model.exit_gate.bias)[..., 0]
    torch.testing.assert_close(model.exit_logit(state), expected)
    assert not model.exit_gate.weight.requires_grad
    with pytest.raises(ValueError, match="no learned gate"):
        build().exit_logit(state)


@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])])
def test_random_state_is_in_evaluation_a_function_of_the_position_alone(mask):
    model = build(state_init="normal", input_injection="add", positions="rotary")
    hidden = model.embed(TOKENS, mask).hidden
    assert torch.equal(hidden, model.embed(TOKENS, mask).hidden)
    for row in range(3):
        real = slice(None) if mask is None else mask[row].bool()
        torch.testing.assert_close(hidden[row, real], model.embed(TOKENS[row, real][None]).hidden[0])
    longer = model.embed(torch.zeros(1, 40, dtype=torch.long)).hidden
    torch.testing.assert_close(longer[0, :6], hidden[1])
    assert hidden.std().item() == pytest.approx(0.62, abs=0.1)
    assert longer.abs().max() <= 3 * 0.4**0.5


def test_random_state_is_in_training_drawn_anew_and_follows_the_steps_key():
    model = build(state_init="normal", input_injection="linear").train()
    assert not torch.equal(model.embed(TOKENS).hidden, model.embed(TOKENS).hidden)
    assert torch.equal(
        build(state_init="zeros", input_injection="add").embed(TOKENS).hidden, torch.zeros(3, 6, 8).double()
    )
    module = LoopLM(LoopedConfig(**SIZE, state_init="normal", input_injection="linear"))
    module.trainer = _Trainer()
    module.log_dict = lambda *args, **kwargs: None
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    losses = []
    for micro_batch in (3, 4, 3):
        torch.randn(7)  # what others draw from the global state does not matter
        module.trainer.fit_loop.epoch_loop.total_batch_idx = micro_batch
        losses.append(module.training_step(batch, 0).item())
    assert losses[0] == losses[2] != losses[1]


class _Trainer:
    """As much of a trainer as a training step reads."""

    global_step = 5
    global_rank = 0
    world_size = 1

    def __init__(self):
        self.fit_loop = self.epoch_loop = self
        self.optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)]
