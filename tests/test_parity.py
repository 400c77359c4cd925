"""Ouro and Huginn against what their own code computed; see the reference's README for the tolerances."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from looplm.checkpoints import from_pretrained, load_checkpoint, save_pretrained
from looplm.cli import main
from looplm.exits import GateExit, exit_distribution
from looplm.generation import GenerationOptions, generate, generate_with_loops
from looplm.loop import unroll

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
if not REFERENCE.is_dir():
    pytest.skip("the reference cases are not here", allow_module_level=True)
OUROS = ["ouro-tiny", "ouro-tiny-kv4"]


def case(name):
    folder = REFERENCE / name
    return from_pretrained(folder), load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")


def near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def compare(expected, seen, actual, key, atol=1e-5):
    near(actual, expected[key].reshape(actual.shape), atol)
    seen.add(key)


@pytest.mark.parametrize("name", OUROS)
@torch.no_grad()
def test_ouro_gives_every_expected_tensor(name):
    model, inputs, expected = case(name)
    seen = set()
    tokens = inputs["input_ids"]
    layers, prenorm = [], []
    hooks = [block.register_forward_hook(lambda *args: layers.append(args[2])) for block in model.core]
    hooks.append(model.final_norm.register_forward_pre_hook(lambda _, args: prenorm.append(args[0])))
    states = list(unroll(model, model.embed(tokens), 7))
    for hook in hooks:
        hook.remove()
    compare(expected, seen, states[0].hidden, "plain.embed")
    for t in range(1, 8):
        compare(expected, seen, states[t].hidden, f"plain.hidden.step{t}", 2e-5)
        compare(expected, seen, prenorm[t - 1], f"plain.hidden_prenorm.step{t}", 2e-5)
    for t in (1, 2):
        for layer in range(3):
            compare(expected, seen, layers[(t - 1) * 3 + layer], f"plain.layer_out.step{t}.layer{layer}")
    gates = torch.stack([model.exit_logit(state) for state in states[1:]], dim=-1)
    compare(expected, seen, gates, "plain.gate_logit", 2e-5)
    compare(expected, seen, gates.sigmoid(), "plain.gate_lambda")
    for T in (1, 2, 4, 7):
        atol = 1e-5 if T <= 4 else 2e-5
        logits = [model.decode(state) for state in states[1 : T + 1]]
        compare(expected, seen, logits[-1], f"plain.logits.T{T}", atol)
        pdf = exit_distribution(gates[..., :T].sigmoid())
        compare(expected, seen, pdf, f"plain.exit_pdf.T{T}")
        mixture = sum(pdf[..., t, None] * logits[t] for t in range(T))
        compare(expected, seen, mixture, f"plain.logits_weighted.T{T}", atol)
        loss = F.cross_entropy(mixture[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        compare(expected, seen, loss, f"plain.loss.T{T}")
        if T == 4:
            for index in range(4):
                compare(expected, seen, logits[index], f"plain.logits_exit_at.T4.idx{index}")
            for q in (30, 50, 70, 90):
                reached = pdf.cumsum(-1) >= q / 100
                step = torch.where(reached.any(-1), reached.int().argmax(-1), T - 1)
                assert torch.equal(step, expected[f"plain.exit_step.T4.q{q}"])
                chosen = torch.stack(logits)[step, torch.arange(2)[:, None], torch.arange(11)]
                compare(expected, seen, chosen, f"plain.logits_threshold.T4.q{q}")
                seen.add(f"plain.exit_step.T4.q{q}")
                for length in range(1, 12):  # the rule, in generation, chooses the same step
                    options = GenerationOptions(num_loops=T, max_new_tokens=1, end_id=-1, exit_rule=GateExit(q / 100))
                    loops = generate_with_loops(model, tokens[:, :length], options).loops[:, 0]
                    assert torch.equal(loops - 1, step[:, length - 1])
    mask = inputs["padded.attention_mask"]
    real = mask.bool()
    states = list(unroll(model, model.embed(inputs["padded.input_ids"], mask), 7))
    gates = torch.stack([model.exit_logit(state) for state in states[1:]], dim=-1)
    for kind in ("default_pos", "mask_pos"):
        key = f"padded.{kind}"
        for t in range(1, 8):
            near(states[t].hidden[real], expected[f"{key}.hidden.step{t}"][real], 2e-5)
            seen.add(f"{key}.hidden.step{t}")
        for T in (1, 2, 4, 7):
            near(model.decode(states[T])[real], expected[f"{key}.logits.T{T}"][real], 1e-5 if T <= 4 else 2e-5)
            seen.add(f"{key}.logits.T{T}")
        near(gates[real], expected[f"{key}.gate_logit"][real], 2e-5)
        seen.add(f"{key}.gate_logit")
    cache = model.make_cache(2, 11, 4)
    state = model.embed(tokens, cache=cache)
    for _ in range(4):
        state = model.step(state, cache)
    for slot in range(12):
        compare(expected, seen, cache.keys[slot], f"cache.T4.key.{slot}")
        compare(expected, seen, cache.values[slot], f"cache.T4.value.{slot}")
    with pytest.raises(ValueError, match="made for `num_loops` 4"):
        model.step(state, cache)
    for kind in ("plain", "padded"):
        mask = inputs.get(f"gen.{kind}.attention_mask")
        for T in (2, 4):
            check_generation(model, inputs[f"gen.{kind}.prompt_ids"], mask, T, expected, seen, f"gen.{kind}.T{T}")
    assert seen == set(expected)


@torch.no_grad()
def check_generation(model, prompt, mask, num_loops, expected, seen, key):
    """Greedy tokens with and without a cache, and the logits that chose them."""
    width = prompt.shape[1]
    for use, kind in (("per_loop", "cache"), ("none", "nocache")):
        new = generate(model, prompt, num_loops=num_loops, max_new_tokens=8, end_id=-1, attention_mask=mask, cache=use)
        tokens = torch.cat([prompt, new], dim=1)
        assert torch.equal(tokens, expected[f"{key}.tokens_{kind}"])
        whole = None if mask is None else torch.cat([mask, torch.ones(len(mask), 8, dtype=mask.dtype)], dim=1)
        if use == "none":
            state = model.embed(tokens, whole)
            for _ in range(num_loops):
                state = model.step(state)
            logits = model.decode(state)[:, width - 1 : -1]
        else:
            logits, cache = [], model.make_cache(len(prompt), tokens.shape[1], num_loops)
            chunks = pairwise([0, *range(width, width + 8)])
            for start, end in chunks:
                part = None if whole is None else whole[:, start:end]
                state = model.embed(tokens[:, start:end], part, cache=cache)
                for _ in range(num_loops):
                    state = model.step(state, cache)
                logits.append(model.decode(state, cache)[:, -1])
            logits = torch.stack(logits, dim=1)
        compare(expected, seen, logits, f"{key}.logits_{kind}")
        seen.add(f"{key}.tokens_{kind}")


@torch.no_grad()
def test_huginn_gives_every_expected_tensor():
    model, inputs, expected = case("huginn-tiny")
    seen = set()
    tokens, start = inputs["input_ids"], inputs["init_state"]
    entered = []
    hook = model.prelude[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    state = model.embed(tokens, initial_hidden=start)
    hook.remove()
    compare(expected, seen, entered[0], "scaled_embed")
    compare(expected, seen, state.context["injected"], "prelude_out")
    joined = []
    hook = model.injection.register_forward_hook(lambda *args: joined.append(args[2]))
    states = list(unroll(model, state, 8))
    hook.remove()
    compare(expected, seen, joined[0], "adapter_out.step1")
    for r in range(1, 9):
        compare(expected, seen, states[r].hidden, f"core.step{r}", 2e-5)
    zero = list(unroll(model, model.embed(tokens, initial_hidden=torch.zeros_like(start)), 8))
    for N in (1, 2, 4, 8):
        atol = 1e-5 if N <= 4 else 2e-5
        normed = []
        hook = model.final_norm.register_forward_hook(lambda *args, normed=normed: normed.append(args[2]))
        logits = model.decode(states[N])
        hook.remove()
        compare(expected, seen, logits, f"logits.N{N}", atol)
        compare(expected, seen, normed[0], f"latent_states.N{N}", 2e-5)
        compare(expected, seen, normed[1], f"head_hidden.N{N}", 2e-5)
        compare(expected, seen, model.decode(zero[N]), f"logits_zero_state.N{N}", atol)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        compare(expected, seen, loss, f"loss_unshifted.N{N}")
    cache = model.make_cache(2, 11, 4)
    state = model.embed(tokens, initial_hidden=start, cache=cache)
    for _ in range(4):
        state = model.step(state, cache)
    model.decode(state, cache)
    # Huginn counts the prelude's slot first and the coda's from the end.
    ours = {"0": 8, "coda1": 9, **{str(slot): slot - 1 for slot in range(1, 9)}}
    for theirs, slot in ours.items():
        compare(expected, seen, cache.keys[slot], f"cache.N4.key.{theirs}")
        compare(expected, seen, cache.values[slot], f"cache.N4.value.{theirs}")
    zero_start = from_pretrained(REFERENCE / "huginn-tiny")
    zero_start.config = type(model.config).from_dict({**model.config.to_dict(), "state_init": "zeros"})
    for N in (2, 4):
        check_generation(zero_start, inputs["gen.prompt_ids"], None, N, expected, seen, f"gen.N{N}")
    assert seen == set(expected)


@pytest.mark.parametrize("name", [*OUROS, "huginn-tiny"])
def test_an_original_is_given_back_name_by_name_and_bit_by_bit(name, tmp_path):
    original = REFERENCE / name
    assert main(["import", str(original), str(tmp_path / "a.ckpt")]) == 0
    assert main(["export", str(tmp_path / "a.ckpt"), str(tmp_path / "hf")]) == 0
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "b.ckpt")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads(
        (original / "config.json").read_text()
    )
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", original))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in theirs)
    first, second = (load_checkpoint(tmp_path / f"{x}.ckpt").state_dict() for x in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)
    model = from_pretrained(original)
    model.origin = None  # the config of ours alone says which family it is
    save_pretrained(model, tmp_path / "fresh", num_loops=4)
    fresh = json.loads((tmp_path / "fresh" / "config.json").read_text())
    assert {k: v for k, v in fresh.items() if k in json.loads((original / "config.json").read_text())} == fresh
