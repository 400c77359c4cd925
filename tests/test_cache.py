import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.cache import LoopKVCache, kept_loops
from looplm.config import LoopedConfig
from looplm.model import LoopedTransformer

VOCAB = 7
BASE = {"vocab_size": VOCAB, "max_positions": 24, "width": 8, "num_heads": 2, "ffn_width": 12, "dropout": 0.0}
ROTARY = {"positions": "rotary", "norm_type": "rms_norm", "activation": "swiglu", "use_bias": False}
ARCHITECTURES = {
    "paper": {},
    "paper with prelude and coda": {"num_prelude_layers": 2, "num_core_layers": 2, "num_coda_layers": 1},
    "ouro": {**ROTARY, "num_core_layers": 2, "norm_placement": "sandwich_branch", "loop_norm": True, "num_kv_heads": 1},
    "huginn": {
        **ROTARY,
        "rotary_pairs": "interleaved",
        "input_injection": "linear",
        "state_init": "normal",
        "num_prelude_layers": 1,
        "num_coda_layers": 1,
        "coda_norm": True,
        "qk_bias": True,
    },
    "parcae": {**ROTARY, "input_injection": "diagonal", "state_init": "zeros", "norm_placement": "pre_norm"},
    "deep norm": {"norm_placement": "post_norm", "deepnorm_alpha": 1.3, "input_injection": "add"},
}


def build(name, seed=0, init_std=0.4):
    torch.manual_seed(seed)
    model = LoopedTransformer(LoopedConfig(**{**BASE, "init_std": init_std, **ARCHITECTURES[name]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim != 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def cached_logits(model, tokens, mask, num_loops, cuts, cache):
    """All logits, the text given in pieces that end at ``cuts``."""
    pieces, start = [], 0
    for end in [*cuts, tokens.shape[1]]:
        part = None if mask is None else mask[:, start:end]
        state = model.embed(tokens[:, start:end], part, cache=cache)
        for _ in range(num_loops):
            state = model.step(state, cache)
        pieces.append(model.decode(state, cache))
        start = end
    return torch.cat(pieces, dim=1)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(ARCHITECTURES)),
    st.integers(0, 1000),
    st.integers(0, 5),
    st.sampled_from(["per_loop", "ring(5)", "ring(9)"]),
    st.lists(st.integers(1, 11), max_size=11, unique=True).map(sorted),
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
    st.booleans(),
)
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones_whatever_the_batch(
    name, seed, num_loops, policy, cuts, paddings, in_double
):
    # Large weights amplify rounding with every loop, which float32 has enough of.
    model = build(name, seed).double() if in_double else build(name, seed, init_std=0.1)
    tolerance = 1e-10 if in_double else 1e-5
    batch, length = len(paddings), 12
    tokens = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) >= torch.tensor(paddings)[:, None]).long()
    given_mask = mask if any(paddings) else None
    whole = model(tokens, num_loops=num_loops, attention_mask=given_mask)
    cache = model.make_cache(batch, length, num_loops, policy)
    assert cache.exact
    pieces = cached_logits(model, tokens, given_mask, num_loops, cuts, cache)
    for row in range(batch):
        real = mask[row].bool()
        torch.testing.assert_close(pieces[row, real], whole[row, real], rtol=0, atol=tolerance)
        alone = model(tokens[row, real][None], num_loops=num_loops)[0]
        torch.testing.assert_close(pieces[row, real], alone, rtol=0, atol=tolerance)


@torch.no_grad()
def test_right_padding_is_not_seen_by_later_tokens():
    model = build("ouro").double()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 6, 6, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]])
    pieces = cached_logits(model, tokens, mask, 3, [4, 5], model.make_cache(2, 6, 3))
    alone = model(torch.tensor([[1, 2, 5, 6]]), num_loops=3)[0]
    torch.testing.assert_close(pieces[1, [0, 1, 4, 5]], alone, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_ring_holds_the_latest_loops_and_its_memory_is_theirs():
    model = build("paper with prelude and coda")
    tokens = torch.tensor([[1, 2, 3]])
    caches = {policy: model.make_cache(1, 3, 5, policy) for policy in ("per_loop", "ring(2)", "last")}
    for cache in caches.values():
        cached_logits(model, tokens, None, 5, [], cache)
    full = caches["per_loop"].keys
    # After five loops (0 to 4) place 0 of the ring holds loop 4 and place 1 loop 3; two layers each.
    torch.testing.assert_close(caches["ring(2)"].keys[:4], torch.cat([full[8:10], full[6:8]]))
    torch.testing.assert_close(caches["last"].keys[:2], full[8:10])
    outer = 3
    sizes = [cache.num_bytes / (2 * 2 * 3 * 4 * 4) for cache in caches.values()]
    assert sizes == [5 * 2 + outer, 2 * 2 + outer, 1 * 2 + outer]
    assert [cache.exact for cache in caches.values()] == [True, False, False]


@torch.no_grad()
def test_inexact_policies_are_exact_for_the_prompt_and_differ_afterwards():
    model = build("paper").double()
    tokens = torch.tensor([[1, 2, 3, 4]])
    whole = model(tokens, num_loops=4)
    for policy in ("last", "ring(2)"):
        pieces = cached_logits(model, tokens, None, 4, [3], model.make_cache(1, 4, 4, policy))
        torch.testing.assert_close(pieces[:, :3], whole[:, :3], rtol=0, atol=1e-10)
        assert (pieces[:, 3] - whole[:, 3]).abs().max() > 1e-4


@pytest.mark.parametrize(("policy", "sources"), [("per_loop", [0, 1, 1, 1, 1]), ("ring(3)", [1, 1, 1]), ("last", [1])])
@torch.no_grad()
def test_a_token_that_stops_early_leaves_its_last_keys_in_the_loops_it_does_not_run(policy, sources):
    model = build("paper")
    tokens = torch.tensor([[1, 2], [3, 4]])
    reference = model.make_cache(2, 2, 5)
    cached_logits(model, tokens, None, 5, [], reference)
    cache = model.make_cache(2, 2, 5, policy)
    state = model.embed(tokens, cache=cache)
    for loop in range(5):
        state = model.step(state, cache)
        if loop == 1:  # row 1 stops after two loops
            cache.select(torch.tensor([1])).fill_skipped(2)
            state, cache = state.select(torch.tensor([0])), cache.select(torch.tensor([0]))
    kept = {"per_loop": [0, 1, 2, 3, 4], "ring(3)": [3, 4, 2], "last": [4]}[policy]
    for store in ("keys", "values"):
        left, full = getattr(cache, store), getattr(reference, store)
        torch.testing.assert_close(left[:, 0], full[kept, 0])
        torch.testing.assert_close(left[:, 1], full[sources, 1])


def test_impossible_caches_and_requests_are_refused():
    model = build("paper")
    for policy in ("ring", "ring(0)", "ring(-1)", "first", ""):
        with pytest.raises(ValueError, match="`cache` must be `per_loop`, `last` or"):
            kept_loops(policy, 4)
    with pytest.raises(ValueError, match="`max_tokens` must be >= 1, got 0"):
        model.make_cache(1, 0, 4)
    cache = model.make_cache(2, 4, 2)
    assert isinstance(cache, LoopKVCache)
    with pytest.raises(ValueError, match="holds 2 rows of at most 4 tokens, got 1 rows"):
        model.embed(torch.ones(1, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="at most 4 tokens, got 2 rows and token 5"):
        model.embed(torch.ones(2, 5, dtype=torch.long), cache=cache)
    state = model.embed(torch.ones(2, 3, dtype=torch.long), cache=cache)
    for _ in range(2):
        state = model.step(state, cache)
    with pytest.raises(ValueError, match="made for `num_loops` 2, got a step after 2 loops"):
        model.step(state, cache)
    long = model.make_cache(1, 30, 2)
    model.embed(torch.ones(1, 20, dtype=torch.long), cache=long)
    with pytest.raises(ValueError, match=r"may have 24 tokens \(`max_positions`\), got 25"):
        model.embed(torch.ones(1, 5, dtype=torch.long), cache=long)
