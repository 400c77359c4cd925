"""Answers looked into, held against one text, one depth and one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from looplm.config import LoopedConfig
from looplm.exits import ConfidenceExit, EntropyExit, ResidualExit
from looplm.generation import generate
from looplm.inspection import inspect_depths, inspect_exits
from looplm.loop import unroll
from looplm.model import LoopedTransformer

DEPTHS = [0, 1, 2, 5, 9]
PROMPT = torch.tensor([3, 1, 4, 1])


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    """A random model whose answers differ from depth to depth."""
    torch.manual_seed(3)
    config = LoopedConfig(
        vocab_size=7, max_positions=16, width=16, num_heads=2, ffn_width=24, init_std=0.5, num_coda_layers=1
    )
    return LoopedTransformer(config).eval()


def test_every_depth_gives_what_generation_gives_there(model: LoopedTransformer) -> None:
    seen = inspect_depths(model, PROMPT, depths=DEPTHS, max_new_tokens=6, end_ids=[2])
    assert len(seen.answers) > 1
    for depth, number in zip(DEPTHS, seen.chosen, strict=True):
        row = generate(model, PROMPT[None], num_loops=depth, max_new_tokens=6, end_id=2)[0].tolist()
        tokens = seen.answers[number].tokens
        assert row[: len(tokens)] == tokens
        assert tokens[-1] == 2 or len(tokens) == 6
        assert 2 not in tokens[:-1]


@torch.no_grad()
def test_signals_are_those_of_each_answer_alone(model: LoopedTransformer) -> None:
    seen = inspect_depths(model, PROMPT, depths=DEPTHS, max_new_tokens=6, end_ids=[2])
    for answer in seen.answers:
        text = torch.cat([PROMPT, torch.tensor(answer.tokens)])[None, :-1]
        states = list(unroll(model, model.embed(text), DEPTHS[-1] + 1))
        for row, depth in enumerate(DEPTHS):
            for place, token in enumerate(answer.tokens):
                at = len(PROMPT) - 1 + place
                p = F.softmax(model.decode(states[depth])[0, at].double(), dim=-1)
                assert answer.probability[row, place].item() == pytest.approx(p[token].item(), abs=1e-5)
                assert answer.entropy[row, place].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
                now, then = states[depth].hidden[0, at], states[depth + 1].hidden[0, at]
                expected = ((then - now).norm() / then.norm()).item()
                assert answer.residual[row, place].item() == pytest.approx(expected, abs=1e-5)


def test_the_token_of_a_depth_is_the_likeliest_at_that_depth(model: LoopedTransformer) -> None:
    seen = inspect_depths(model, PROMPT, depths=DEPTHS, max_new_tokens=6, end_ids=[])
    for row, number in enumerate(seen.chosen):
        # Of 7 tokens the likeliest has a seventh at least.
        assert (seen.answers[number].probability[row] >= 1 / 7 - 1e-6).all()


def test_path_keeps_the_distances_that_its_components_explain(model: LoopedTransformer) -> None:
    (answer, *_) = inspect_depths(model, PROMPT, depths=DEPTHS, max_new_tokens=1, end_ids=[]).answers
    states = torch.stack([s.hidden[0, -1] for s in unroll(model, model.embed(PROMPT[None]), 9)])[DEPTHS].detach()
    spread = (states - states.mean(0)).square().sum()
    assert answer.path.square().sum().item() == pytest.approx((answer.explained.sum() * spread).item(), rel=1e-4)
    assert 0 < answer.explained.sum() <= 1 + 1e-6


def test_a_loose_exit_stops_at_once_and_a_strict_one_never(model: LoopedTransformer) -> None:
    rules = {"loose": ResidualExit(1e9), "strict": EntropyExit(1e-9)}
    seen = inspect_exits(model, PROMPT, rules, num_loops=5, max_new_tokens=4, end_ids=[])
    assert seen["loose"].loops == [1] * 4
    assert seen["strict"].loops == [5] * 4
    assert seen["strict"].mean_loops == 5
    full = generate(model, PROMPT[None], num_loops=5, max_new_tokens=4, end_id=-1)[0].tolist()
    assert seen["strict"].tokens == full


def test_every_end_mark_ends_an_answer(model: LoopedTransformer) -> None:
    free = inspect_exits(model, PROMPT, {"a": ConfidenceExit(1.0)}, num_loops=3, max_new_tokens=6, end_ids=[])["a"]
    stops = [6, free.tokens[1]]  # the second of two marks
    cut = inspect_exits(model, PROMPT, {"a": ConfidenceExit(1.0)}, num_loops=3, max_new_tokens=6, end_ids=stops)["a"]
    assert cut.tokens == free.tokens[: 1 + min(free.tokens.index(stop) for stop in stops if stop in free.tokens)]


def test_one_depth_is_refused(model: LoopedTransformer) -> None:
    with pytest.raises(ValueError, match="two at least"):
        inspect_depths(model, PROMPT, depths=[3], max_new_tokens=1, end_ids=[])
