import pytest
import torch
from torch import nn

from looplm.loop import LoopedModel, LoopState, check_depths, unroll, unroll_at


class Affine(nn.Module):
    """``h ↦ w·h + c`` with c in the context: every state has a closed form. Counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.num_steps = 0

    def embed(self, inputs, attention_mask=None, initial_hidden=None):
        return LoopState(inputs if initial_hidden is None else initial_hidden, {"shift": torch.ones(1, 1)})

    def step(self, state):
        self.num_steps += 1
        return state.advance(self.weight * state.hidden + state.context["shift"])

    def decode(self, state):
        return state.hidden


H0 = torch.tensor([[4.0], [0.0]], dtype=torch.float64)


def closed_form(depth):
    return 2 + (H0 - 2) * 0.5**depth


def test_any_class_with_three_methods_is_a_looped_model():
    assert isinstance(Affine(), LoopedModel)
    assert not isinstance(nn.Linear(1, 1), LoopedModel)


def test_the_index_of_an_unrolled_state_is_its_depth():
    model = Affine()
    states = list(unroll(model, model.embed(H0), 5))
    assert [state.depth for state in states] == list(range(6))
    for depth, state in enumerate(states):
        torch.testing.assert_close(state.hidden, closed_form(depth))


def test_zero_loops_yield_the_start_alone():
    model = Affine()
    start = model.embed(H0)
    assert list(unroll(model, start, 0)) == [start]
    assert model.num_steps == 0


def test_many_depths_cost_one_pass_and_equal_separate_runs():
    model, depths = Affine(), [0, 1, 3, 7]
    reached = dict(unroll_at(model, model.embed(H0), depths))
    assert model.num_steps == 7
    assert list(reached) == depths
    for depth, state in reached.items():
        assert state.depth == depth
        torch.testing.assert_close(state.hidden, closed_form(depth))


@pytest.mark.parametrize(
    ("depths", "named"),
    [
        ([], "name at least one depth"),
        *((bad, "be non-negative and strictly increasing") for bad in ([-1, 2], [2, 2], [3, 1])),
    ],
)
def test_depths_that_do_not_increase_are_refused_by_name(depths, named):
    with pytest.raises(ValueError, match=f"`val_depths` must {named}"):
        check_depths("val_depths", depths)
    with pytest.raises(ValueError, match="`depths`"):
        list(unroll_at(Affine(), LoopState(H0), depths))


def test_negative_num_loops_are_refused():
    with pytest.raises(ValueError, match="`num_loops` must be >= 0, got -1"):
        list(unroll(Affine(), LoopState(H0), -1))


@pytest.mark.parametrize(("backprop_loops", "recorded"), [(None, 5), (1, 1), (2, 2), (5, 5), (9, 5)])
def test_gradient_flows_through_the_last_loops_only(backprop_loops, recorded):
    model = Affine()
    *_, state = unroll(model, model.embed(H0), 5, backprop_loops)
    (gradient,) = torch.autograd.grad(state.hidden.sum(), model.weight)
    # d h_t / d w = Σ_j w^j h_{t-1-j}, cut after the recorded loops.
    expected = sum(0.5**j * closed_form(4 - j) for j in range(recorded)).sum()
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(state.hidden.detach(), closed_form(5))


def test_selected_samples_step_like_the_whole_batch():
    model = Affine()
    per_sample = {"shift": torch.tensor([[1.0], [2.0], [3.0]]), "none": None, "pair": (torch.ones(1, 4), torch.eye(3))}
    state = LoopState(torch.arange(3.0)[:, None], per_sample, depth=2)
    rows = torch.tensor([2, 0])
    part = state.select(rows)
    torch.testing.assert_close(model.step(part).hidden, model.step(state).hidden[rows])
    assert part.depth == 2
    assert part.context["none"] is None
    torch.testing.assert_close(part.context["pair"], (torch.ones(1, 4), torch.eye(3)[rows]))


def test_select_and_detach_treat_every_part_of_a_dict_state():
    hidden = {"a": torch.arange(4.0, requires_grad=True).reshape(2, 2), "b": torch.arange(6.0).reshape(2, 3)}
    state = LoopState(hidden)
    part = state.select(torch.tensor([1])).hidden
    torch.testing.assert_close(part, {"a": torch.tensor([[2.0, 3.0]]), "b": torch.tensor([[3.0, 4.0, 5.0]])})
    assert hidden["a"].requires_grad
    assert not state.detach().hidden["a"].requires_grad


def test_a_state_is_immutable():
    state = LoopState(H0)
    with pytest.raises(AttributeError):
        state.depth = 3
    assert state.advance(H0 + 1).depth == 1
    assert state.depth == 0
