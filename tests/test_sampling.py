import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.sampling import Sampling

LOGITS = torch.tensor([[0.5, 2.0, -1.0, 1.0, 0.0]])
ROWS = torch.arange(20_000)


def frequencies(sampling):
    drawn = sampling(LOGITS.expand(len(ROWS), -1), ROWS, 0)
    return torch.bincount(drawn, minlength=5) / len(ROWS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    expected = (LOGITS[0] / temperature).softmax(-1)
    # Five standard deviations of a frequency.
    tolerance = 5 * (expected * (1 - expected) / len(ROWS)).sqrt().max().item()
    torch.testing.assert_close(frequencies(Sampling(temperature=temperature)), expected, rtol=0, atol=tolerance)


def test_only_the_likeliest_tokens_are_drawn_and_in_their_proportion():
    p = LOGITS[0].softmax(-1)
    for sampling, kept in (
        (Sampling(temperature=1.0, top_k=2), [1, 3]),
        (Sampling(temperature=1.0, top_p=float(p[1] + p[3]) - 1e-4), [1, 3]),
        (Sampling(temperature=1.0, top_p=float(p[1] + p[3]) + 1e-4), [0, 1, 3]),
        (Sampling(temperature=1.0, top_p=1e-9), [1]),
        (Sampling(temperature=1.0, top_k=3, top_p=1.0), [0, 1, 3]),
    ):
        expected = torch.zeros(5)
        expected[kept] = p[kept] / p[kept].sum()
        found = frequencies(sampling)
        assert (found > 0).nonzero().flatten().tolist() == kept
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 500), st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True))
def test_a_draw_depends_on_seed_row_and_place_alone(seed, place, rows):
    logits = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=1.0, top_k=4, seed=seed)
    whole = sampling(logits, torch.arange(100), place)
    assert torch.equal(sampling(logits[rows], torch.tensor(rows), place), whole[rows])
    assert not torch.equal(sampling(logits, torch.arange(100), place + 1), whole)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-310, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_temperature_is_almost_greedy(temperature, dtype):
    logits = torch.tensor([[1e4, -3e4, 1.2e4, -float("inf"), 0.0]], dtype=dtype).expand(50, -1)
    assert (Sampling(temperature=temperature, top_p=0.9)(logits, torch.arange(50), 0) == 2).all()
    tied = torch.tensor([[1.0, 1.0, 0.0]], dtype=dtype).expand(200, -1)
    assert set(Sampling(temperature=temperature)(tied, torch.arange(200), 0).tolist()) == {0, 1}


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-float("inf"), 0.0, -float("inf")]]).expand(1000, -1)
    assert (Sampling(temperature=5.0)(logits, torch.arange(1000), 3) == 1).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "`temperature` must be >= 0"),
        ({"temperature": float("nan")}, "`temperature` must be >= 0"),
        ({"temperature": 1.0, "top_k": 0}, "`top_k` must be >= 1, got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"temperature": 1.0, "top_k": 2.5}, "`top_k` must be an integer, got 2.5"),
        ({"temperature": 1.0, "top_k": True}, "`top_k` must be an integer, got True"),
        ({"temperature": 1.0, "top_p": "0.9"}, "`top_p` must be a number, got '0.9'"),
        ({"temperature": None}, "`temperature` must be a number, got None"),
        ({"top_k": 3}, "no effect with `temperature: 0`"),
    ],
)
def test_impossible_or_ineffective_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
