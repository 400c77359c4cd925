import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.depth import (
    DepthStage,
    FixedDepth,
    LogNormalDepth,
    LogUniformDepth,
    PoissonDepth,
    ScheduledDepth,
    UniformDepth,
)
from looplm.randomness import StepKey

NUM_DRAWS = 4000


@st.composite
def samplers(draw):
    low = draw(st.integers(1, 12))
    high = draw(st.integers(low, low + 40))
    return draw(
        st.sampled_from(
            [
                FixedDepth(low),
                UniformDepth(low, high),
                LogUniformDepth(low, high),
                PoissonDepth(draw(st.floats(0.1, 60)), low, high),
                LogNormalDepth(draw(st.floats(-1, 4)), draw(st.floats(0.05, 2)), low, high),
            ]
        )
    )


@settings(deadline=None, max_examples=60)
@given(samplers(), st.floats(0, 1, exclude_max=True))
def test_a_sampler_is_its_pmf(sampler, u):
    pmf = sampler.pmf()
    depths = np.arange(len(pmf))
    low = getattr(sampler, "min_depth", getattr(sampler, "depth", None))
    high = getattr(sampler, "max_depth", low)
    assert pmf.min() >= 0
    assert pmf.sum() == pytest.approx(1, abs=1e-12)
    assert depths[pmf > 0].min() >= low
    assert depths[-1] == high
    assert sampler.mean == pytest.approx((depths * pmf).sum())
    depth = sampler.quantile(u)
    assert low <= depth <= high
    assert pmf[:depth].sum() <= u + 1e-12
    assert u <= pmf[: depth + 1].sum() + 1e-12


@pytest.mark.parametrize(
    "sampler",
    [
        FixedDepth(4),
        UniformDepth(2, 9),
        LogUniformDepth(3, 40),
        PoissonDepth(4, 3, 6),
        LogNormalDepth(2.0, 0.7, 1, 100),
        LogNormalDepth(1.7, 0.4, 1, 16),
    ],
)
def test_draws_follow_the_documented_pmf(sampler):
    depths = np.array([sampler.sample(StepKey(seed=0, micro_batch=i)) for i in range(NUM_DRAWS)])
    pmf = sampler.pmf()
    error = math.sqrt((np.arange(len(pmf)) - sampler.mean) ** 2 @ pmf / NUM_DRAWS)
    assert abs(depths.mean() - sampler.mean) <= 4 * error
    counts = np.bincount(depths, minlength=len(pmf))
    assert len(counts) == len(pmf)
    assert np.all(np.abs(counts - NUM_DRAWS * pmf) <= 5 * np.sqrt(NUM_DRAWS * pmf) + 1e-9 + 5 * (pmf > 0))


@pytest.mark.parametrize(("mu", "sigma", "low", "high"), [(2.0, 0.7, 1, 100), (1.7, 0.4, 1, 16), (1.0, 1.0, 3, 5)])
def test_log_normal_equals_clipped_rounded_exponentials(mu, sigma, low, high):
    normal = np.random.default_rng(0).normal(mu, sigma, 200_000)
    brute = np.clip(np.round(np.exp(normal)), low, high)
    sampler = LogNormalDepth(mu, sigma, low, high)
    assert sampler.mean == pytest.approx(brute.mean(), abs=5 * brute.std() / math.sqrt(len(brute)))
    frequencies = np.bincount(brute.astype(int), minlength=high + 1) / len(brute)
    np.testing.assert_allclose(sampler.pmf(), frequencies, atol=5 * math.sqrt(0.25 / len(brute)))


def test_log_uniform_draws_every_doubling_equally_often():
    pmf = LogUniformDepth(4, 63).pmf()
    np.testing.assert_allclose([pmf[4:8].sum(), pmf[8:16].sum(), pmf[16:32].sum(), pmf[32:64].sum()], 0.25)


def test_poisson_puts_clipped_mass_on_its_ends():
    def poisson(n):
        return math.exp(-4) * 4**n / math.factorial(n)

    pmf = PoissonDepth(4.0, min_depth=2, max_depth=5).pmf()
    below = poisson(0) + poisson(1) + poisson(2)
    above = 1 - below - poisson(3) - poisson(4)
    np.testing.assert_allclose(pmf, [0, 0, below, poisson(3), poisson(4), above], atol=1e-15)


def test_poisson_of_a_high_rate_neither_overflows_nor_loses_mass():
    sampler = PoissonDepth(1000.0, 1, 1200)
    assert sampler.mean == pytest.approx(1000, abs=1e-3)


def test_a_range_of_one_depth_is_fixed():
    for sampler in (UniformDepth(3, 3), LogUniformDepth(3, 3), PoissonDepth(9.0, 3, 3), LogNormalDepth(2.0, 0.7, 3, 3)):
        np.testing.assert_array_equal(sampler.pmf(), FixedDepth(3).pmf())


def schedule():
    inner = ScheduledDepth(
        [DepthStage(start_step=0, sampler=FixedDepth(3)), DepthStage(start_step=5, sampler=UniformDepth(1, 7))]
    )
    return ScheduledDepth([DepthStage(start_step=0, sampler=FixedDepth(2)), DepthStage(start_step=10, sampler=inner)])


def test_a_schedule_switches_at_its_starts_and_counts_nested_stages_from_their_own():
    means = [schedule().at_step(step).mean for step in (0, 9, 10, 14, 15, 1000)]
    assert means == pytest.approx([2, 2, 3, 3, 4, 4])
    drawn = [schedule().sample(StepKey(seed=0, micro_batch=77, optimizer_step=step)) for step in (9, 10)]
    assert drawn == [2, 3]


def test_mean_and_pmf_of_a_schedule_are_those_of_its_end():
    assert schedule().mean == pytest.approx(4)
    np.testing.assert_array_equal(schedule().pmf(), UniformDepth(1, 7).pmf())


def test_depth_is_a_pure_function_of_seed_and_micro_batch():
    sampler = UniformDepth(1, 1_000)
    depths = {
        (seed, batch): sampler.sample(StepKey(seed=seed, micro_batch=batch))
        for seed, batch in itertools.product((0, 1), (0, 1))
    }
    assert len(set(depths.values())) == 4
    for (seed, batch), depth in depths.items():
        again = StepKey(seed=seed, micro_batch=batch, rank=5, optimizer_step=9)
        assert UniformDepth(1, 1_000).sample(again) == depth


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedDepth(0), "`depth` must be >= 1, got 0"),
        (lambda: UniformDepth(0, 3), "`min_depth` must be >= 1, got 0"),
        (lambda: PoissonDepth(4.0, 5, 4), r"`max_depth` must be >= `min_depth` \(5\), got 4"),
        (lambda: PoissonDepth(0.0), "`rate` must be > 0, got 0.0"),
        (lambda: LogNormalDepth(sigma=0.0), "`sigma` must be > 0, got 0.0"),
        (lambda: ScheduledDepth([]), r"`start_step` of the `stages` must begin at 0 and increase, got \[\]"),
        (lambda: ScheduledDepth([DepthStage(start_step=1, sampler=FixedDepth(1))]), r"must begin at 0.*got \[1\]"),
        (lambda: ScheduledDepth([DepthStage(start_step=0, sampler=FixedDepth(1))] * 2), r"increase, got \[0, 0\]"),
    ],
)
def test_impossible_distributions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
