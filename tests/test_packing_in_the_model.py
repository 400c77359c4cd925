"""Packed rows: every document is computed as if it stood alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from looplm import JacobianPenalty, LoopedConfig, LoopedTransformer, STARSObjective, UniformDepth
from looplm.metrics import share_all_right
from looplm.randomness import StepKey

KINDS = {
    "learned": {"positions": "learned"},
    "rotary": {"positions": "rotary"},
    "interleaved": {"positions": "rotary", "rotary_pairs": "interleaved", "input_injection": "linear"},
    "noise": {"positions": "rotary", "state_init": "normal", "input_injection": "add"},
    "outer": {"positions": "learned", "num_prelude_layers": 1, "num_coda_layers": 1},
}


def _model(kind: str, max_positions: int = 12) -> LoopedTransformer:
    torch.manual_seed(3)
    config = LoopedConfig(
        vocab_size=13,
        max_positions=max_positions,
        width=16,
        num_heads=2,
        ffn_width=32,
        init_std=0.3,
        dropout=0.0,
        **KINDS[kind],
    )
    return LoopedTransformer(config).eval()


def _pack(documents: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    tokens, numbers = torch.zeros(1, length, dtype=torch.long), torch.zeros(1, length, dtype=torch.long)
    start = 0
    for number, document in enumerate(documents, start=1):
        tokens[0, start : start + len(document)] = document
        numbers[0, start : start + len(document)] = number
        start += len(document)
    return tokens, numbers


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), extra=st.integers(0, 3), seed=st.integers(0, 99))
def test_packing_changes_no_documents_loss(kind: str, lengths: list[int], extra: int, seed: int) -> None:
    model, depth = _model(kind, max_positions=15), UniformDepth(1, 6).sample(StepKey(seed=seed, micro_batch=0))
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(13, (length,), generator=generator) for length in lengths]
    tokens, numbers = _pack(documents, sum(lengths) + extra)
    with torch.no_grad():
        packed = model(tokens, depth, numbers)[0]
        for number, document in enumerate(documents, start=1):
            alone = model(document[None], depth)[0]
            targets = torch.randint(13, document.shape, generator=generator)
            together = packed[numbers[0] == number]
            assert abs(F.cross_entropy(together, targets) - F.cross_entropy(alone, targets)) <= 1e-5
    assert bool(packed.isfinite().all())


def test_no_gradient_flows_between_documents() -> None:
    model = _model("rotary")
    tokens, numbers = _pack([torch.tensor([1, 2, 3]), torch.tensor([4, 5])], 6)
    state = model.embed(tokens, numbers)
    hidden = state.hidden.detach().requires_grad_()
    out = model.step(model.embed(tokens, numbers, hidden)).hidden
    (gradient,) = torch.autograd.grad(out[0, 3:5, 0].sum(), hidden)
    assert bool((gradient[0, :3] == 0).all())
    assert bool((gradient[0, 5:] == 0).all())
    assert bool((gradient[0, 3:5] != 0).any())


@pytest.mark.parametrize("kind", ["learned", "rotary"])
@pytest.mark.parametrize("value", [1, 7])
def test_integer_mask_of_one_document_is_a_plain_mask(kind: str, value: int) -> None:
    model, tokens = _model(kind), torch.arange(8).reshape(2, 4)
    for real in (torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])):
        expected = model(tokens, 2, real.bool())
        assert torch.equal(model(tokens, 2, real * value), expected)
        assert torch.equal(model(tokens, 2, real.float()), expected)


def test_packed_row_may_be_longer_than_the_model_takes_but_a_document_may_not() -> None:
    model = _model("learned", max_positions=4)
    tokens = torch.zeros(1, 7, dtype=torch.long)
    assert model(tokens, 1, torch.tensor([[1, 1, 1, 1, 2, 2, 2]])).shape == (1, 7, 13)
    assert model(tokens, 1, torch.tensor([[1, 2, 0, 0, 0, 0, 0]])).shape == (1, 7, 13)
    with pytest.raises(ValueError, match=r"may have 4 tokens .* got 5"):
        model(tokens, 1, torch.tensor([[1, 1, 1, 1, 1, 2, 2]]))


def test_packed_rows_and_a_cache_exclude_each_other() -> None:
    model = _model("rotary")
    with pytest.raises(ValueError, match="one document a row"):
        model.embed(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 2, 2]]), cache=model.make_cache(1, 8, 2))


def test_objective_with_its_penalty_takes_packed_rows() -> None:
    model = _model("rotary")
    objective = STARSObjective(
        depth_sampler=UniformDepth(1, 4), penalty=JacobianPenalty(fraction=0.5), penalty_weight=0.1
    )
    numbers = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 3, 3]])
    batch = {"input_ids": torch.ones_like(numbers), "labels": torch.ones_like(numbers), "attention_mask": numbers}
    out = objective(model, batch, StepKey(seed=0, micro_batch=0))
    assert bool(out.loss.isfinite())
    assert out.penalty is not None
    assert float(out.penalty) > 0


def test_exact_match_counts_documents() -> None:
    right = torch.tensor([[True, True, False, True, True], [True, True, True, False, False]])
    numbers = torch.tensor([[1, 1, 2, 2, 3], [1, 1, 1, 0, 0]])
    assert share_all_right(right, numbers).item() == 0.75
    assert share_all_right(right, None).item() == 0.0
