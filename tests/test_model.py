import itertools

import pytest
import torch
import torch.nn.functional as F

from looplm.config import LoopedConfig
from looplm.loop import LoopedModel, LoopState
from looplm.model import LoopedTransformer

VOCAB, LENGTH = 11, 6
COMBINATIONS = list(
    itertools.product(
        ["pre_norm", "post_norm", "sandwich_branch", "sandwich_dual"],
        ["layer_norm", "rms_norm", "simple_norm"],
        ["learned", "rotary"],
        ["gelu", "swiglu"],
        ["none", "add", "linear", "diagonal"],
    )
)
every_combination = pytest.mark.parametrize(
    ("norm_placement", "norm_type", "positions", "activation", "input_injection"), COMBINATIONS
)


def build(seed=0, **changes):
    """A tiny model whose weights are large enough for every part to matter."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "max_positions": 10, "width": 8, "num_heads": 2, "ffn_width": 12}
    model = LoopedTransformer(LoopedConfig(**{**sizes, "init_std": 0.5, "dropout": 0.0, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.fixture
def tokens():
    return torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@every_combination
def test_no_logit_depends_on_a_later_token(norm_placement, norm_type, positions, activation, input_injection, tokens):
    model = build(
        norm_placement=norm_placement,
        norm_type=norm_type,
        positions=positions,
        activation=activation,
        input_injection=input_injection,
        num_prelude_layers=1,
        num_coda_layers=1,
    )
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % VOCAB
    before, after = model(tokens, num_loops=3), model(changed, num_loops=3)
    assert before.shape == (3, LENGTH, VOCAB)
    assert before.isfinite().all()
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=1e-10, atol=1e-10)
    assert ((before - after)[:, 3:].abs().amax(-1) > 1e-6).all()


@every_combination
def test_padding_on_either_side_changes_nothing_at_real_positions(
    norm_placement, norm_type, positions, activation, input_injection, tokens
):
    model = build(
        norm_placement=norm_placement,
        norm_type=norm_type,
        positions=positions,
        activation=activation,
        input_injection=input_injection,
        num_prelude_layers=1,
        num_coda_layers=1,
    )
    # One row of each kind in one batch; the tokens under the padding are arbitrary.
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    right_only = real.sort(dim=1, descending=True).values
    for mask in (real, right_only):
        logits = model(tokens, num_loops=3, attention_mask=mask)
        assert logits.isfinite().all()
        for row in range(3):
            alone = model(tokens[row, mask[row].bool()][None], num_loops=3)[0]
            torch.testing.assert_close(logits[row, mask[row].bool()], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm_placement", ["pre_norm", "sandwich_dual"])
@pytest.mark.parametrize("input_injection", ["none", "add", "linear"])
def test_model_equals_its_definition(norm_placement, input_injection, tokens):
    model = build(
        norm_placement=norm_placement,
        input_injection=input_injection,
        num_prelude_layers=2,
        num_core_layers=2,
        num_coda_layers=1,
    )
    table = model.token_embedding.weight
    e = model.prelude[1](model.prelude[0](table[tokens] + model.position_embedding.weight[:LENGTH]))
    h = e
    for num_loops in range(4):
        expected = model.final_norm(model.coda[0](h)) @ table.T
        torch.testing.assert_close(model(tokens, num_loops=num_loops), expected)
        joined = torch.cat([h, e], -1) @ model.injection.weight.T if input_injection == "linear" else h + e
        h = model.core[1](model.core[0](h if input_injection == "none" else joined))


def test_zero_loops_decode_the_embedding(tokens):
    model = build()
    h0 = model.token_embedding(tokens) + model.position_embedding(torch.arange(LENGTH))
    torch.testing.assert_close(model(tokens, num_loops=0), F.linear(model.final_norm(h0), model.token_embedding.weight))


def test_core_runs_once_a_loop_and_prelude_and_coda_once(tokens):
    model = build(num_prelude_layers=1, num_core_layers=2, num_coda_layers=1)
    calls = []
    for name, block in [*model.prelude.named_children(), *model.coda.named_children()]:
        block.register_forward_hook(lambda *_, name=name: calls.append("outer" + name))
    for name, block in model.core.named_children():
        block.register_forward_hook(lambda *_, name=name: calls.append("core" + name))
    model(tokens, num_loops=3)
    assert calls == ["outer0", *["core0", "core1"] * 3, "outer0"]


def test_depth_adds_no_parameters_and_the_paper_model_has_its_size():
    model = LoopedTransformer(LoopedConfig.stars_addition(vocab_size=17, max_positions=16))
    attention = 4 * (512 * 512 + 512)
    mlp = 512 * 1024 + 1024 + 1024 * 512 + 512
    norms = 5 * 2 * 512  # four in the block, one before the head
    assert sum(p.numel() for p in model.parameters()) == (17 + 16) * 512 + attention + mlp + norms


def test_initial_weights_are_normal_and_start_neutral():
    model = LoopedTransformer(LoopedConfig.stars_addition(vocab_size=17, max_positions=16))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.all(parameter == (1 if name.endswith("weight") else 0))
        elif name.endswith("bias"):
            assert torch.all(parameter == 0)
        else:
            # The standard deviation of n draws has a relative error of 1/√(2n).
            assert parameter.std().item() == pytest.approx(0.02, rel=5 / (2 * parameter.numel()) ** 0.5)
            assert parameter.abs().max() > 3 * 0.02


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_head_shares_the_embedding_only_when_tied(tie_embeddings, tokens):
    model = build(tie_embeddings=tie_embeddings)
    reached = model.embed(tokens)
    logits = model.decode(reached)
    with torch.no_grad():
        model.token_embedding.weight.mul_(2.0)
    factor = 2.0 if tie_embeddings else 1.0
    torch.testing.assert_close(model.decode(reached), factor * logits)
    assert any(name.startswith("head") for name, _ in model.named_parameters()) != tie_embeddings


def test_logits_of_some_positions_are_those_of_all(tokens):
    model = build(num_coda_layers=1)
    reached = model.embed(tokens)
    logits = model.decode(reached)
    where = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    torch.testing.assert_close(model.decode(reached, logits_to_keep=where), logits[where])
    torch.testing.assert_close(model.decode(reached, logits_to_keep=2), logits[:, -2:])


@pytest.mark.parametrize("rows", ["plain", "left_padded", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "rotary", "num_kv_heads": 1, "num_core_layers": 2, "use_bias": True},
        {"positions": "rotary", "rotary_pairs": "interleaved", "qk_bias": True, "loop_norm": True},
        {"input_injection": "linear", "num_prelude_layers": 1, "norm_placement": "post_norm", "coda_norm": True},
        {"input_injection": "diagonal", "activation": "swiglu", "norm_type": "rms_norm", "tie_embeddings": False},
        {"num_coda_layers": 1},
    ],
)
def test_the_last_step_at_some_positions_is_that_of_all(changes, rows, tokens):
    model = build(**changes)
    batch, length = tokens.shape
    mask = {
        "plain": None,
        "left_padded": torch.arange(length) >= torch.arange(batch)[:, None] % 3,
        "packed": 1 + (torch.arange(length) >= length // 2).long().expand(batch, -1),
    }[rows]
    state = model.step(model.embed(tokens, mask))
    where = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    where[0] = False
    where[:, -2:] = True
    logits, last, num_queries = model.step_and_decode(state, where)
    whole = model.step(state)
    expected = model.decode(whole)[where]
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    most = int(where.sum(1).max())
    spares = most <= 0.75 * length and not changes.get("num_coda_layers")
    assert num_queries == batch * (most if spares else length)
    assert last is None if spares else torch.equal(last.hidden, whole.hidden)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"allow_unused": True, "retain_graph": True}
    gradients = (torch.autograd.grad(out.square().sum(), parameters, **options) for out in (logits, expected))
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_step_is_pure_and_counts_depth(positions, tokens):
    model = build(positions=positions, input_injection="linear")
    state = model.embed(tokens, torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(3, -1))
    copy = state.hidden.clone()
    first, second = model.step(state), model.step(state)
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(state.hidden, copy)
    assert (state.depth, first.depth, model.step(first).depth) == (0, 1, 2)
    torch.testing.assert_close(model.step(LoopState(first.hidden, state.context)).hidden, model.step(first).hidden)


def test_a_given_initial_state_replaces_h0_but_not_the_injected_input(tokens):
    model = build(input_injection="linear")
    usual = model.embed(tokens)
    start = torch.randn_like(usual.hidden)
    state = model.embed(tokens, initial_hidden=start)
    assert torch.equal(state.hidden, start)
    assert torch.equal(state.context["injected"], usual.hidden)


@pytest.mark.parametrize("padded", [False, True])
def test_selected_samples_step_like_the_whole_batch(padded, tokens):
    model = build(positions="rotary", input_injection="add")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]]) if padded else None
    state, rows = model.embed(tokens, mask), torch.tensor([0, 2])
    torch.testing.assert_close(model.step(state.select(rows)).hidden, model.step(state).hidden[rows])


def test_dropout_acts_in_training_only(tokens):
    model = build(dropout=0.3)
    assert torch.equal(model(tokens, num_loops=2), model(tokens, num_loops=2))
    assert torch.equal(model(tokens, num_loops=2), build(dropout=0.0)(tokens, num_loops=2))
    model.train()
    state = model.embed(tokens)
    assert not torch.equal(state.hidden, model.embed(tokens).hidden)
    assert not torch.equal(model.step(state).hidden, model.step(state).hidden)


def test_model_fulfils_the_contract_of_looped_models():
    assert isinstance(build(), LoopedModel)


def test_inputs_that_do_not_fit_are_refused(tokens):
    model = build()
    with pytest.raises(ValueError, match=r"may have 10 tokens \(`max_positions`\), got 11"):
        model(torch.zeros(1, 11, dtype=torch.long), num_loops=1)
    with pytest.raises(ValueError, match=r"`attention_mask` must be \(3, 6\), got \(3, 5\)"):
        model(tokens, num_loops=1, attention_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="non-negative"):
        model(tokens, num_loops=-1)
