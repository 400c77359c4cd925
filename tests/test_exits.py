from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_cache import ARCHITECTURES, VOCAB, build

from looplm.exits import (
    ConfidenceExit,
    EntropyExit,
    ExitRule,
    GateExit,
    KLExit,
    LoopSignals,
    ResidualExit,
    exit_distribution,
)
from looplm.generation import GenerationOptions, generate, generate_with_loops
from looplm.loop import LoopState, unroll
from looplm.model import LoopedTransformer

PROMPTS = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6], [0, 2, 2, 5]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


def options(**changes):
    return GenerationOptions(**{"num_loops": 6, "max_new_tokens": 5, "end_id": -1, **changes})


class At(ExitRule):
    """Stops every token at one depth."""

    def __init__(self, depth):
        super().__init__()
        self.depth = depth

    def __call__(self, signals):
        return torch.full((len(signals.hidden),), signals.depth >= self.depth)


class Never(ExitRule):
    def __call__(self, signals):
        return torch.zeros(len(signals.hidden), dtype=torch.bool)


def rules(with_gate):
    gate = [GateExit(0.6)] if with_gate else []
    return [ResidualExit(0.4), KLExit(0.05), EntropyExit(1.5), ConfidenceExit(0.35), *gate]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("cache", ["per_loop", "last", "ring(2)", "none"])
def test_an_exit_that_never_stops_changes_nothing(name, cache):
    model = build(name).double()
    plain = generate_with_loops(model, PROMPTS, options(cache=cache), MASK)
    watched = generate_with_loops(model, PROMPTS, options(cache=cache, exit_rule=Never()), MASK)
    assert torch.equal(plain.tokens, watched.tokens)
    assert torch.equal(plain.loops, torch.full((3, 5), 6))
    assert torch.equal(watched.loops, plain.loops)


@pytest.mark.parametrize("name", ["paper", "ouro", "huginn"])
@pytest.mark.parametrize("cache", ["per_loop", "none"])
def test_an_exit_that_stops_everything_at_a_depth_is_that_depth(name, cache):
    model = build(name).double()
    plain = generate_with_loops(model, PROMPTS, options(cache=cache, num_loops=3), MASK)
    stopped = generate_with_loops(model, PROMPTS, options(cache=cache, exit_rule=At(3)), MASK)
    assert torch.equal(plain.tokens, stopped.tokens)
    assert torch.equal(stopped.loops, plain.loops)
    assert stopped.mean_loops == 3.0


@pytest.mark.parametrize("cache", ["per_loop", "last", "ring(2)", "none"])
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("name", ["paper", "huginn"])
def test_a_row_exits_as_it_does_alone(cache, index, name):
    model, rule = build(name, seed=3).double(), rules(False)[index]
    together = generate_with_loops(model, PROMPTS, options(cache=cache, exit_rule=rule, max_new_tokens=8), MASK)
    for row in range(3):
        alone = generate_with_loops(
            model, PROMPTS[row, MASK[row].bool()][None], options(cache=cache, exit_rule=rule, max_new_tokens=8)
        )
        assert torch.equal(together.tokens[row], alone.tokens[0])
        assert torch.equal(together.loops[row], alone.loops[0])


@pytest.mark.parametrize("name", ["paper", "huginn"])
def test_the_first_token_is_exact_at_the_depth_it_reports(name):
    model = build(name, seed=3).double()
    depths = set()
    for rule in rules(False):
        result = generate_with_loops(model, PROMPTS, options(exit_rule=rule), MASK)
        for row in range(3):
            depth = int(result.loops[row, 0])
            depths.add(depth)
            logits = model(PROMPTS[row, MASK[row].bool()][None], num_loops=depth)[0, -1]
            assert logits.argmax() == result.tokens[row, 0]
    assert len(depths) > 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_stops_where_all_its_real_tokens_may(name):
    # What follows reads the keys and values of every one of them.
    model = build(name).double()
    for tolerance in (0.5, 0.2, 0.05):
        found = generate_with_loops(model, PROMPTS, options(exit_rule=ResidualExit(tolerance)), MASK).loops[:, 0]
        for row, mask, loops in zip(PROMPTS, MASK, found.tolist(), strict=True):
            states = [state.hidden for state in unroll(model, model.embed(row[mask.bool()][None]), 6)]
            residuals = [(now - before).norm(dim=-1) / now.norm(dim=-1) for before, now in pairwise(states)]
            done = [depth for depth, residual in enumerate(residuals, start=1) if bool((residual <= tolerance).all())]
            assert loops == min([*done, 6])


def test_rows_that_have_stopped_are_no_longer_computed():
    model = build("paper", seed=5)
    computed = []
    model.core[0].register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[:2].numel()))
    rule = ResidualExit(0.15)
    result = generate_with_loops(model, PROMPTS, options(exit_rule=rule, max_new_tokens=8), None)
    prompt, later = result.loops[:, 0].sum() * 4, result.loops[:, 1:].sum()
    assert sum(computed) == prompt + later
    assert len(set(result.loops.flatten().tolist())) > 2
    assert result.mean_loops < 6


def test_rules_equal_their_formulas():
    torch.manual_seed(0)
    previous, hidden = torch.randn(2, 50, 4)
    before, logits = 2 * torch.randn(2, 50, VOCAB)
    survival = torch.rand(50)
    signals = LoopSignals(
        depth=2, previous=previous, hidden=hidden, logits=logits, previous_logits=before, survival=survival
    )
    p, q = logits.softmax(-1), before.softmax(-1)
    values = {
        ResidualExit: (hidden - previous).norm(dim=1) / hidden.norm(dim=1),
        KLExit: (p * (p / q).log()).sum(1),
        EntropyExit: -(p * p.log()).sum(1),
        ConfidenceExit: -p.max(1).values,
        GateExit: -(1 - survival),
    }
    for rule, value in values.items():
        threshold = value.median().item()
        stops = rule(abs(threshold))(signals)
        clear = (value - threshold).abs() > 1e-5
        assert torch.equal(stops[clear], (value < threshold)[clear])
        assert 0 < stops.sum() < 50


def test_the_gates_quantile_is_reached_where_its_distribution_says():
    torch.manual_seed(0)
    gates = torch.rand(200, 6)
    pdf = exit_distribution(gates)
    torch.testing.assert_close(pdf.sum(-1), torch.ones(200))
    assert torch.equal(pdf, exit_distribution(torch.cat([gates[:, :-1], torch.rand(200, 1)], 1)))
    for quantile in (0.3, 0.7, 0.95):
        reached = pdf.cumsum(-1) >= quantile
        expected = torch.where(reached.any(-1), reached.int().argmax(-1), 5)
        survival, rule, steps = torch.ones(200), GateExit(quantile), torch.full((200,), 5)
        for t in range(5):
            survival = survival * (1 - gates[:, t])
            now = rule(LoopSignals(depth=t + 1, previous=gates, hidden=gates, survival=survival))
            steps = torch.where(now & (steps == 5), t, steps)
        assert (steps == expected).float().mean() > 0.99  # the two sums may round apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantile_of_one_runs_every_loop(dtype):
    torch.manual_seed(3)
    model = LoopedTransformer(replace(build("ouro").config, exit_gate=True)).eval().to(dtype)
    model.exit_gate.weight.data.zero_()
    model.exit_gate.bias.data.fill_(20.0)  # its sigmoid is 1 in float32
    always = generate_with_loops(model, PROMPTS, options(exit_rule=GateExit(1.0)), MASK)
    assert torch.equal(always.loops, torch.full((3, 5), 6))
    early = generate_with_loops(model, PROMPTS, options(exit_rule=GateExit(0.99)), MASK)
    assert torch.equal(early.loops, torch.ones(3, 5).long())
    survival = torch.tensor([0.0, 1e-30])
    signals = LoopSignals(depth=1, previous=torch.zeros(2, 1), hidden=torch.zeros(2, 1), survival=survival)
    assert GateExit(1.0)(signals).tolist() == [True, False]


def test_certain_and_impossible_tokens_have_no_entropy():
    logits = torch.tensor([[0.0, -float("inf"), -float("inf")]])
    h = torch.zeros(1, 1)
    assert EntropyExit(1e-6)(LoopSignals(depth=1, previous=h, hidden=h, logits=logits)).item()


def test_no_token_stops_before_the_least_number_of_loops():
    model = build("paper", seed=3)
    result = generate_with_loops(model, PROMPTS, options(exit_rule=ResidualExit(10.0, min_loops=4)), MASK)
    assert torch.equal(result.loops, torch.full((3, 5), 4))
    # Consecutive logits are two: the divergence cannot stop the first loop.
    result = generate_with_loops(model, PROMPTS, options(exit_rule=KLExit(1e9)), MASK)
    assert torch.equal(result.loops, torch.full((3, 5), 2))


def test_a_foreign_model_without_a_cache_exits_too():
    inner = build("paper", seed=3).double()

    class Foreign:
        def embed(self, inputs, attention_mask=None, initial_hidden=None):
            return inner.embed(inputs, attention_mask, initial_hidden)

        def step(self, state):
            return inner.step(state)

        def decode(self, state):
            return inner.decode(state)

    class TwoStates(Foreign):
        """The same with its state in two halves."""

        def embed(self, inputs, attention_mask=None, initial_hidden=None):
            return self.halves(inner.embed(inputs, attention_mask))

        def halves(self, state):
            a, b = state.hidden.chunk(2, dim=-1)
            return LoopState({"a": a, "b": b}, state.context, state.depth)

        def whole(self, state):
            return LoopState(torch.cat([state.hidden["a"], state.hidden["b"]], -1), state.context, state.depth)

        def step(self, state):
            return self.halves(inner.step(self.whole(state)))

        def decode(self, state):
            return inner.decode(self.whole(state))

    for rule in (None, *rules(False)):
        expected = generate_with_loops(inner, PROMPTS, options(exit_rule=rule, cache="none"), MASK)
        for foreign in (Foreign(), TwoStates()):
            result = generate_with_loops(foreign, PROMPTS, options(exit_rule=rule), MASK)
            assert torch.equal(result.tokens, expected.tokens)
            assert torch.equal(result.loops, expected.loops)
    with pytest.raises(ValueError, match="`cache: last` needs a model with `make_cache`, Foreign has none"):
        generate(Foreign(), PROMPTS, num_loops=1, max_new_tokens=1, end_id=-1, cache="last")
    with pytest.raises(ValueError, match="GateExit needs a model with `exit_logit`"):
        generate(Foreign(), PROMPTS, num_loops=1, max_new_tokens=1, end_id=-1, exit_rule=GateExit(0.5))
    with pytest.raises(ValueError, match="no learned gate"):
        generate(inner, PROMPTS, num_loops=1, max_new_tokens=1, end_id=-1, exit_rule=GateExit(0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualExit(0.0), "`tolerance` must be > 0, got 0.0"),
        (lambda: KLExit(-1.0), "`threshold` must be > 0, got -1.0"),
        (lambda: EntropyExit(float("nan")), "`threshold` must be > 0, got nan"),
        (lambda: ConfidenceExit(1.5), r"`threshold` must be in \(0, 1\], got 1.5"),
        (lambda: GateExit(0.0), r"`quantile` must be in \(0, 1\], got 0.0"),
        (lambda: ResidualExit(0.1, min_loops=0), "`min_loops` must be >= 1, got 0"),
    ],
)
def test_impossible_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
