import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from looplm.config import LoopedConfig
from looplm.depth import DepthStage, FixedDepth, ScheduledDepth, UniformDepth
from looplm.loop import LoopState
from looplm.model import LoopedTransformer
from looplm.objective import STARSObjective, settling_term
from looplm.randomness import StepKey
from looplm.stability.penalty import JacobianPenalty, LastStepPenalty, Penalty
from looplm.stability.settling import SettlingPenalty

VOCAB, WIDTH = 5, 4
KEY = StepKey(seed=0, micro_batch=3)


class Scaling(nn.Module):
    """``h ↦ dropout(s_i·w·h)``, s_i fixed for each sequence: J⁽ⁱ⁾ = s_i·w·I, so every unit vector has gain (s_i·w)²."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.table = nn.Embedding.from_pretrained(
            torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(2)).double(), freeze=False
        )
        self.head = nn.Linear(WIDTH, VOCAB).double()
        self.dropout = nn.Dropout(dropout)
        self.scales = None

    def embed(self, inputs, attention_mask=None, initial_hidden=None):
        scales = torch.ones(len(inputs)).double() if self.scales is None else self.scales
        context = {"attention_mask": attention_mask, "scales": scales[:, None, None]}
        return LoopState(self.table(inputs) if initial_hidden is None else initial_hidden, context)

    def step(self, state):
        return state.advance(self.dropout(state.context["scales"] * self.weight * state.hidden))

    def decode(self, state):
        return self.head(state.hidden)


class Draw(Penalty):
    """Shows what a penalty is given: its own random number, and the first entries of its sequences."""

    def __init__(self, fraction=1.0):
        self.fraction = fraction

    def __call__(self, step_fn, hidden, previous, mask, generator):
        self.rows = hidden[:, 0, 0].tolist()
        self.mask = mask
        return torch.rand((), generator=generator)


class LastStepOfHalf(LastStepPenalty):
    """Its gradient enters the trajectory through both states."""

    fraction = 0.5


class Failing(Penalty):
    def __call__(self, step_fn, hidden, previous, mask, generator):
        raise RuntimeError("no penalty today")


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (4, 3), generator=draw)
    labels[:, 0] = -100
    return {"input_ids": torch.randint(VOCAB, (4, 3), generator=draw), "labels": labels}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Scaling()


def transformer(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "max_positions": 4, "width": 8, "num_heads": 2, "ffn_width": 12}
    model = LoopedTransformer(LoopedConfig(**{**sizes, "init_std": 0.5, "dropout": 0.0, **changes}))
    return model.double()


def cross_entropy(model, batch, depth):
    """By its definition, over labelled tokens."""
    state = model.embed(batch["input_ids"], batch.get("attention_mask"))
    for _ in range(depth):
        state = model.step(state)
    log_probabilities = model.decode(state).log_softmax(-1)
    labelled = (batch["labels"] != -100).nonzero().tolist()
    return -torch.stack([log_probabilities[i, j, batch["labels"][i, j]] for i, j in labelled]).mean()


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
def test_loss_mixes_cross_entropy_and_penalty(model, batch, method):
    objective = STARSObjective(depth_sampler=FixedDepth(3), penalty=JacobianPenalty(method=method), penalty_weight=0.3)
    out = objective(model, batch, KEY)
    expected = 0.7 * cross_entropy(model, batch, 3) + 0.3 * model.weight**2
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.penalty.item() == pytest.approx(0.25)
    assert (out.depth, out.penalty_weight) == (3, 0.3)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected, parameters), rtol=1e-5, atol=1e-7
    )


def test_without_penalty_the_loss_is_cross_entropy(model, batch):
    out = STARSObjective(depth_sampler=FixedDepth(2))(model, batch, KEY)
    assert out.penalty is None
    assert out.loss.item() == pytest.approx(cross_entropy(model, batch, 2).item(), rel=1e-6)
    assert out.loss.item() == out.cross_entropy.item()
    assert out.num_preds == batch["labels"].ne(-100).sum()


@pytest.mark.parametrize("spare_unlabelled", [False, True])
@pytest.mark.parametrize("changes", [{}, {"num_coda_layers": 1}, {"tie_embeddings": False}])
def test_logits_of_labelled_positions_alone_give_the_same_loss_and_gradient(batch, changes, spare_unlabelled):
    model = transformer(**changes).eval()
    out = STARSObjective(depth_sampler=FixedDepth(2), spare_unlabelled=spare_unlabelled)(model, batch, KEY)
    expected = cross_entropy(model, batch, 2)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected, parameters), rtol=1e-5, atol=1e-7
    )
    best = model(batch["input_ids"], 2).argmax(-1)
    assert torch.equal(out.preds, best.masked_fill(batch["labels"] == -100, -100))


@pytest.mark.parametrize("checkpoint_loops", [None, 1])
@pytest.mark.parametrize("backprop_loops", [None, 1, 2])
@pytest.mark.parametrize("num_loops", [1, 2, 3])
def test_sparing_unlabelled_positions_changes_no_gradient(batch, num_loops, backprop_loops, checkpoint_loops):
    model = transformer(input_injection="add", num_prelude_layers=1).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outs = []
    for spare_unlabelled in (False, True):
        options = {"backprop_loops": backprop_loops, "checkpoint_loops": checkpoint_loops if spare_unlabelled else None}
        objective = STARSObjective(depth_sampler=FixedDepth(num_loops), spare_unlabelled=spare_unlabelled, **options)
        outs.append(objective(model, batch, KEY))
    everywhere, spared = outs
    assert spared.num_queries < everywhere.num_queries == batch["labels"].numel()
    assert torch.equal(spared.preds, everywhere.preds)
    gradients = (torch.autograd.grad(out.loss, parameters, allow_unused=True) for out in outs)
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("penalty", "spares"),
    [
        (JacobianPenalty(method="jvp", fraction=0.25), True),
        (JacobianPenalty(method="finite_difference", fraction=0.5), True),
        (LastStepOfHalf(), True),
        (JacobianPenalty(method="jvp"), False),
        (LastStepPenalty(), False),
        (SettlingPenalty(), False),
    ],
)
@pytest.mark.parametrize("backprop_loops", [None, 1])
def test_a_penalty_reads_the_same_states_when_unlabelled_positions_are_spared(batch, penalty, spares, backprop_loops):
    model = transformer(input_injection="add").eval()
    outs = []
    for spare_unlabelled in (False, True):
        options = {"backprop_loops": backprop_loops, "spare_unlabelled": spare_unlabelled}
        late = {"penalty": penalty, "penalty_weight": 0.5, "penalty_start_step": 1}
        objective = STARSObjective(depth_sampler=FixedDepth(3), **late, **options)
        outs.append(objective(model, batch, replace(KEY, optimizer_step=1)))
    everywhere, spared = outs
    assert (spared.num_queries < everywhere.num_queries) == spares
    assert everywhere.penalty > 0
    torch.testing.assert_close(spared.penalty, everywhere.penalty, rtol=1e-9, atol=0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = (torch.autograd.grad(out.loss, parameters, allow_unused=True) for out in outs)
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-9)


def test_before_the_penalty_starts_every_step_is_spared(batch):
    late = {"penalty": JacobianPenalty(), "penalty_weight": 0.1, "penalty_start_step": 5}
    objective = STARSObjective(depth_sampler=FixedDepth(2), spare_unlabelled=True, **late)
    model = transformer().eval()
    before, after = (objective(model, batch, replace(KEY, optimizer_step=step)) for step in (4, 5))
    assert before.num_queries < after.num_queries == batch["labels"].numel()


@pytest.mark.parametrize("spare_unlabelled", [False, True])
def test_a_batch_without_labels_has_no_loss_and_zero_gradients(batch, spare_unlabelled):
    model = transformer()
    objective = STARSObjective(depth_sampler=FixedDepth(2), spare_unlabelled=spare_unlabelled)
    out = objective(model, {**batch, "labels": batch["labels"] * 0 - 100}, KEY)
    out.loss.backward()
    assert (out.loss, out.num_preds) == (0, 0)
    assert all(not parameter.grad.any() for parameter in model.core.parameters())


def test_weight_starts_ramps_and_stays():
    def weights(**schedule):
        objective = STARSObjective(
            depth_sampler=FixedDepth(1), penalty=JacobianPenalty(), penalty_weight=0.1, **schedule
        )
        return [objective.weight_at(step) for step in (0, 99, 100, 125, 200, 10_000)]

    assert weights() == [0.1] * 6
    assert weights(penalty_start_step=100) == [0, 0, 0.1, 0.1, 0.1, 0.1]
    assert weights(penalty_start_step=100, penalty_ramp_steps=100) == pytest.approx([0, 0, 0, 0.025, 0.1, 0.1])
    assert weights(penalty_ramp_steps=200) == pytest.approx([0, 0.0495, 0.05, 0.0625, 0.1, 0.1])


def test_penalty_costs_nothing_before_it_starts(model, batch):
    objective = STARSObjective(
        depth_sampler=FixedDepth(1), penalty=Failing(), penalty_weight=0.5, penalty_start_step=10
    )
    before = StepKey(seed=0, micro_batch=0, optimizer_step=9)
    out = objective(model, batch, before)
    assert out.penalty is None
    assert out.penalty_weight == 0
    assert out.loss.item() == out.cross_entropy.item()
    with pytest.raises(RuntimeError, match="no penalty today"):
        objective(model, batch, StepKey(seed=0, micro_batch=0, optimizer_step=10))


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


@pytest.mark.parametrize("input_injection", ["none", "linear"])
@pytest.mark.parametrize("backprop_loops", [1, 2, 4, 9])
def test_truncated_gradient_equals_that_of_a_detached_state(batch, backprop_loops, input_injection):
    model = transformer(input_injection=input_injection)
    out = STARSObjective(depth_sampler=FixedDepth(4), backprop_loops=backprop_loops)(model, batch, KEY)
    state = model.embed(batch["input_ids"])
    for depth in range(4):
        state = model.step(state.detach() if depth == 4 - backprop_loops and depth > 0 else state)
    expected = F.cross_entropy(model.decode(state).flatten(0, 1), batch["labels"].flatten())
    truncated = gradients(model, out.loss)
    # The objective's cross-entropy is float32.
    torch.testing.assert_close(truncated, gradients(model, expected), rtol=1e-5, atol=1e-7)
    full = gradients(model, STARSObjective(depth_sampler=FixedDepth(4))(model, batch, KEY).loss)
    assert all(map(torch.equal, truncated, full)) == (backprop_loops >= 4)


def test_jacobian_penalty_sends_no_gradient_into_the_trajectory(batch):
    model = transformer(tie_embeddings=False)
    out = STARSObjective(depth_sampler=FixedDepth(3), penalty=JacobianPenalty(), penalty_weight=1.0)(model, batch, KEY)
    out.loss.backward()
    assert not model.token_embedding.weight.grad.any()
    assert not model.position_embedding.weight.grad.any()
    assert all(p.grad.any() for name, p in model.core.named_parameters() if name.endswith("weight"))


def test_last_step_penalty_sends_its_gradient_through_the_trajectory(model, batch):
    out = STARSObjective(depth_sampler=FixedDepth(3), penalty=LastStepPenalty(), penalty_weight=1.0)(model, batch, KEY)
    h0 = model.table(batch["input_ids"])
    expected = ((model.weight**3 - model.weight**2) * h0).norm(dim=-1).mean()
    assert out.penalty.item() == pytest.approx(expected.item())
    parts = [model.weight, model.table.weight]
    torch.testing.assert_close(torch.autograd.grad(out.loss, parts), torch.autograd.grad(expected, parts))


@pytest.mark.parametrize("backprop_loops", [None, 2, 3])
def test_settling_penalty_reads_every_state_from_the_first_that_has_a_gradient(model, batch, backprop_loops):
    objective = STARSObjective(
        depth_sampler=FixedDepth(4), penalty=SettlingPenalty(0.9), penalty_weight=0.25, backprop_loops=backprop_loops
    )
    labels = batch["labels"]
    out = objective(model, batch, KEY)
    h0 = model.table(batch["input_ids"])
    asked = labels != -100
    start = 0 if backprop_loops is None else 4 - backprop_loops
    grown = [h0 * model.weight.detach() ** start * model.weight**power for power in range(4 - start + 1)]
    trajectory = torch.stack([state[asked] for state in grown][1 if start == 0 else 0 :])
    is_right = torch.stack([model.head(state).argmax(-1) == labels[asked] for state in trajectory])
    expected = SettlingPenalty(0.9)(trajectory, is_right)
    torch.testing.assert_close(out.penalty, expected.detach())
    cross_entropy = F.cross_entropy(model.head(trajectory[-1]).float(), labels[asked])
    parts = [model.weight, model.head.weight]
    wanted = torch.autograd.grad(0.75 * cross_entropy + 0.25 * expected, parts)
    torch.testing.assert_close(torch.autograd.grad(out.loss, parts), wanted)


def test_settling_penalty_of_a_single_loop_is_zero(model, batch):
    objective = STARSObjective(depth_sampler=FixedDepth(1), penalty=SettlingPenalty(), penalty_weight=0.5)
    assert objective(model, batch, KEY).penalty.item() == 0.0


def test_settling_penalty_needs_a_state_for_each_label_and_all_states(model, batch):
    with pytest.raises(ValueError, match="`checkpoint_loops` must be null: a SettlingPenalty reads every state"):
        STARSObjective(depth_sampler=FixedDepth(3), penalty=SettlingPenalty(), penalty_weight=0.5, checkpoint_loops=1)
    states = [LoopState(torch.ones(2, 1, WIDTH)), LoopState(torch.ones(2, 1, WIDTH))]
    with pytest.raises(ValueError, match="a state for each label"):
        settling_term(SettlingPenalty(), model, states, torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "penalty", [LastStepPenalty(), JacobianPenalty(), JacobianPenalty(method="jvp"), SettlingPenalty()]
)
def test_gradient_is_finite_when_the_state_has_converged_exactly(model, batch, penalty):
    with torch.no_grad():
        model.weight.fill_(1.0)  # Φ is the identity
    STARSObjective(depth_sampler=FixedDepth(2), penalty=penalty, penalty_weight=0.5)(model, batch, KEY).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def observe(key, fraction=0.5):
    """Return depth, random number and penalised rows of one training step."""
    model, penalty = Scaling(), Draw(fraction)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.table.weight[:, 0] = torch.arange(VOCAB)  # the first entry names the sequence
    objective = STARSObjective(depth_sampler=UniformDepth(1, 1000), penalty=penalty, penalty_weight=0.5)
    inputs = torch.arange(VOCAB)[:, None]
    out = objective(model, {"input_ids": inputs, "labels": inputs}, key)
    return out.depth, out.penalty.item(), penalty.rows


def test_every_draw_is_a_pure_function_of_seed_rank_and_micro_batch():
    seen = {}
    for seed, rank, micro_batch in itertools.product((0, 1), (0, 1), range(3)):
        key = {"seed": seed, "rank": rank, "micro_batch": micro_batch}
        torch.manual_seed(seed + rank)
        first = observe(StepKey(**key))
        torch.manual_seed(7)
        assert observe(StepKey(**key, optimizer_step=5)) == first
        seen[seed, rank, micro_batch] = first
    depths, numbers, rows = zip(*seen.values(), strict=True)
    assert len(set(numbers)) == len(seen)
    assert len(set(map(tuple, rows))) > len(seen) / 2
    # The depth leaves the rank out: unequal depths would dead-lock sharded training.
    assert len(set(depths)) == len(seen) / 2
    assert all(seen[s, 0, m][0] == seen[s, 1, m][0] for s, m in itertools.product((0, 1), range(3)))


def test_depth_schedule_runs_in_optimizer_steps(model, batch):
    stages = [DepthStage(start_step=0, sampler=FixedDepth(1)), DepthStage(start_step=2, sampler=FixedDepth(5))]
    objective = STARSObjective(depth_sampler=ScheduledDepth(stages))
    assert [objective(model, batch, StepKey(seed=0, micro_batch=9, optimizer_step=s)).depth for s in (1, 2)] == [1, 5]


@pytest.mark.parametrize(("fraction", "size"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.8, 3), (1.0, 4)])
def test_a_fraction_is_an_unbiased_estimate_on_changing_rows(batch, fraction, size):
    model = Scaling()
    model.scales = torch.tensor([1.0, 2.0, 3.0, 5.0]).double()
    gains = (0.5 * model.scales) ** 2
    objective = STARSObjective(
        depth_sampler=FixedDepth(1), penalty=JacobianPenalty(method="jvp", fraction=fraction), penalty_weight=0.5
    )
    steps = 300
    values = [objective(model, batch, StepKey(seed=0, micro_batch=i)).penalty.item() for i in range(steps)]
    possible = {round(sum(rows) / size, 6) for rows in itertools.combinations(gains.tolist(), size)}
    assert {round(value, 6) for value in values} == possible
    # Sampling without replacement from a population of 4.
    error = math.sqrt(gains.var().item() / size * (1 - size / 4) / steps)
    assert abs(sum(values) / steps - gains.mean().item()) <= 4 * error + 1e-9


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_penalty_sees_the_mask_of_its_rows(model, fraction):
    penalty = Draw(fraction)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.table.weight[:, 0] = torch.arange(VOCAB)
    inputs = torch.arange(4)[:, None].expand(-1, 3)
    batch = {"input_ids": inputs, "labels": inputs, "attention_mask": torch.tensor([[1, 1, 1]]) * inputs}
    STARSObjective(depth_sampler=FixedDepth(1), penalty=penalty, penalty_weight=0.5)(model, batch, KEY)
    assert len(penalty.rows) == 4 * fraction
    assert penalty.mask[:, 0].tolist() == penalty.rows


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
def test_dropout_is_off_inside_the_penalty_only(batch, method):
    model = Scaling(dropout=0.5)
    objective = STARSObjective(depth_sampler=FixedDepth(1), penalty=JacobianPenalty(method=method), penalty_weight=0.5)
    first, second = objective(model, batch, KEY), objective(model, batch, KEY)
    assert first.penalty.item() == pytest.approx(0.25)
    assert first.cross_entropy != second.cross_entropy


@pytest.mark.parametrize("penalty", [JacobianPenalty(), Failing()])
def test_training_flags_are_restored_even_after_an_error(batch, penalty):
    model = transformer(dropout=0.1).train()
    model.core[0].ffn.eval()  # a part that its owner has frozen stays frozen
    before = {name: module.training for name, module in model.named_modules()}
    objective = STARSObjective(depth_sampler=FixedDepth(1), penalty=penalty, penalty_weight=0.5)
    if isinstance(penalty, Failing):
        with pytest.raises(RuntimeError, match="no penalty today"):
            objective(model, batch, KEY)
    else:
        objective(model, batch, KEY)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


@pytest.mark.parametrize("changes", [{}, {"norm_placement": "pre_norm", "positions": "rotary"}])
def test_padding_changes_neither_loss_nor_gradient(batch, changes):
    """LastStepPenalty is deterministic, so both losses can be compared."""
    model = transformer(**changes)
    objective = STARSObjective(depth_sampler=FixedDepth(2), penalty=LastStepPenalty(), penalty_weight=0.5)
    padded = {
        "input_ids": F.pad(batch["input_ids"], (1, 0), value=1),
        "labels": F.pad(batch["labels"], (1, 0), value=-100),
        "attention_mask": F.pad(torch.ones(4, 3), (1, 0)),
    }
    plain, left = (objective(model, data, KEY).loss for data in (batch, padded))
    assert left.item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(gradients(model, left), gradients(model, plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": JacobianPenalty(), "penalty_weight": 1.5}, r"`penalty_weight` \(λ\) must be in \[0, 1\], got 1.5"),
        ({"penalty": JacobianPenalty()}, "go together, got JacobianPenalty with `penalty_weight` 0"),
        ({"penalty_weight": 0.1}, "go together, got None with `penalty_weight` 0.1"),
        ({"penalty_start_step": 5}, "`penalty_start_step` has no effect without a `penalty`, got 5"),
        ({"penalty_ramp_steps": 5}, "`penalty_ramp_steps` has no effect without a `penalty`, got 5"),
        (
            {"spare_unlabelled": True, "penalty": JacobianPenalty(fraction=0.6), "penalty_weight": 0.1},
            "`spare_unlabelled` has no effect with a `penalty` that reads the last states of more than half of the "
            "sequences from the first step on, got JacobianPenalty on 60%",
        ),
        ({"penalty_start_step": -1}, "`penalty_start_step` must be >= 0, got -1"),
        ({"backprop_loops": 0}, "`backprop_loops` must be >= 1, got 0"),
    ],
)
def test_wrong_and_ineffective_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        STARSObjective(depth_sampler=FixedDepth(1), **options)
