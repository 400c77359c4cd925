"""A problem's answers looked into: each depth's, how sure every token is, how far states still move, where exits stop.

Knows the contract of looped models and ids; no tokenizer, no files and no page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from looplm.dynamics import Trajectory, fixed_point_residual
from looplm.exits import ExitRule
from looplm.generation import GenerationOptions, generate_at_depths, generate_with_loops
from looplm.loop import LoopedModel, LoopState, check_depths, unroll

__all__ = ["DepthInspection", "ExitInspection", "InspectedAnswer", "inspect_depths", "inspect_exits"]


@dataclass(frozen=True, kw_only=True)
class InspectedAnswer:
    """An answer of N tokens, read at K depths with itself as the text (as in training).

    Example:
        >>> once = torch.tensor([[0.5], [0.9]])
        >>> plane = {"path": torch.zeros(2, 2), "explained": torch.ones(2)}
        >>> answer = InspectedAnswer(tokens=[3], probability=once, entropy=once, residual=once, **plane)
        >>> answer.probability[-1].tolist() == [once[1].item()]
        True
    """

    tokens: list[int]
    """Its ids, the end mark included."""
    probability: Tensor
    """Of each token at each depth, given those before it, ``(K, N)``."""
    entropy: Tensor
    """Of the next-token distribution read off each state (the logit lens), in nats, ``(K, N)``."""
    residual: Tensor
    """``‖Φ(h) − h‖ / ‖Φ(h)‖`` of the state that each token is read from, ``(K, N)``."""
    path: Tensor
    """These N states at each depth, as one vector, in the plane of their two principal components, ``(K, 2)``."""
    explained: Tensor
    """Share of the variance along each component, ``(2,)``."""


@dataclass(frozen=True, kw_only=True)
class DepthInspection:
    """The answers to a prompt at K depths.

    Example:
        >>> DepthInspection(depths=[0, 1], answers=[], chosen=[0, 0]).depths
        [0, 1]
    """

    depths: list[int]
    """The depths."""
    answers: list[InspectedAnswer]
    """The different answers, in the order in which depths first give them."""
    chosen: list[int]
    """Which of ``answers`` each depth gives, K numbers."""


@dataclass(frozen=True, kw_only=True)
class ExitInspection:
    """What a prompt's answer is where an exit rule decides the depth of every token.

    Example:
        >>> ExitInspection(tokens=[5, 2], loops=[3, 8]).mean_loops
        5.5
    """

    tokens: list[int]
    """Ids, the end mark included."""
    loops: list[int]
    """Loops that each took."""

    @property
    def mean_loops(self) -> float:
        """Mean over the tokens."""
        return sum(self.loops) / len(self.loops)


@torch.no_grad()
def inspect_depths(
    model: LoopedModel,
    prompt: Tensor,
    *,
    depths: Sequence[int],
    max_new_tokens: int,
    end_ids: Sequence[int],
) -> DepthInspection:
    """Answer a prompt at K depths, then read every different answer at all of them.

    The answers are greedy and cost one batch of K rows (:func:`~looplm.generation.generate_at_depths`); reading U
    different answers costs one batch of U rows, ``max(depths) + 1`` steps and K decodes.

    Args:
        model: Any looped model over token ids whose states are ``(B, T, …)``, in eval mode.
        prompt: Ids, int64 ``(T,)``.
        depths: K ≥ 2 strictly increasing depths.
        max_new_tokens: Longest answer.
        end_ids: Ids that end an answer; none: nothing does.

    Raises:
        ValueError: If there are fewer than two depths, they are not increasing, or the model cannot take as many
            tokens.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> config = LoopedConfig(vocab_size=5, max_positions=8, width=8, num_heads=2, ffn_width=8)
        >>> model = LoopedTransformer(config).eval()
        >>> seen = inspect_depths(model, torch.tensor([1, 2]), depths=[0, 4], max_new_tokens=3, end_ids=[])
        >>> seen.answers[0].probability.shape
        torch.Size([2, 3])
    """
    depths = check_depths("depths", depths)
    if len(depths) < 2:
        raise ValueError(f"`depths` must be two at least, got {depths}.")
    end_id, stop = _ends(end_ids)
    rows = generate_at_depths(
        model, prompt[None], depths=depths, max_new_tokens=max_new_tokens, end_id=end_id, stop=stop
    )
    said = [_cut(row, end_ids) for row in rows[:, 0].tolist()]
    different = list(dict.fromkeys(said))
    answers = _read(model, prompt, [list(tokens) for tokens in different], depths)
    return DepthInspection(depths=depths, answers=answers, chosen=[different.index(tokens) for tokens in said])


def inspect_exits(
    model: LoopedModel,
    prompt: Tensor,
    rules: Mapping[str, ExitRule],
    *,
    num_loops: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
) -> dict[str, ExitInspection]:
    """Answer a prompt once with each exit rule.

    Args:
        model: Any looped model over token ids, in eval mode.
        prompt: Ids, int64 ``(T,)``.
        rules: Rules by name.
        num_loops: Most loops of a token.
        max_new_tokens: Longest answer.
        end_ids: Ids that end an answer; none: nothing does.

    Raises:
        ValueError: If the model has not what a rule needs, or cannot take as many tokens.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer, ResidualExit
        >>> config = LoopedConfig(vocab_size=5, max_positions=8, width=8, num_heads=2, ffn_width=8)
        >>> model, rules = LoopedTransformer(config).eval(), {"residual": ResidualExit(1e9)}
        >>> seen = inspect_exits(model, torch.tensor([1, 2]), rules, num_loops=4, max_new_tokens=3, end_ids=[])
        >>> seen["residual"].loops
        [1, 1, 1]
    """
    end_id, stop = _ends(end_ids)
    found = {}
    for name, rule in rules.items():
        options = GenerationOptions(
            num_loops=num_loops, max_new_tokens=max_new_tokens, end_id=end_id, stop=stop, exit_rule=rule
        )
        generation = generate_with_loops(model, prompt[None], options)
        tokens = _cut(generation.tokens[0].tolist(), end_ids)
        found[name] = ExitInspection(tokens=list(tokens), loops=generation.loops[0, : len(tokens)].tolist())
    return found


def _ends(end_ids: Sequence[int]) -> tuple[int, list[list[int]]]:
    return (end_ids[0] if end_ids else -1), [[token] for token in end_ids[1:]]


def _cut(row: Sequence[int], end_ids: Sequence[int]) -> tuple[int, ...]:
    """Return a row up to its first end mark."""
    first = next((place for place, token in enumerate(row) if token in end_ids), len(row))
    return tuple(row[: first + 1])


def _read(
    model: LoopedModel, prompt: Tensor, answers: Sequence[list[int]], depths: Sequence[int]
) -> list[InspectedAnswer]:
    longest = max(map(len, answers))
    labels = torch.zeros(len(answers), longest, dtype=torch.long, device=prompt.device)
    for row, tokens in enumerate(answers):
        labels[row, : len(tokens)] = torch.tensor(tokens, device=prompt.device)
    # Padding stands right, where no real token attends to it; the last token of an answer is never read.
    text = torch.cat([prompt.expand(len(answers), -1), labels[:, :-1]], dim=1)
    columns: list[tuple[Tensor, ...]] = []
    for state, following in _with_following(model, model.embed(text), depths):
        now, then = _positions(state, longest), _positions(following, longest)
        log_p = model.decode(state)[:, -longest:].float().log_softmax(-1)
        probability = log_p.gather(-1, labels[..., None]).squeeze(-1).exp()
        # A probability of zero has no entropy, whatever its logarithm.
        entropy = -torch.where(log_p.isinf(), 0.0, log_p.exp() * log_p).sum(-1)
        residual = fixed_point_residual(now.flatten(0, 1), then.flatten(0, 1)).view(now.shape[:2])
        columns.append((probability, entropy, residual, now))
    probability, entropy, residual, hidden = (torch.stack(parts).cpu() for parts in zip(*columns, strict=True))
    found = []
    for row, tokens in enumerate(answers):
        length = len(tokens)
        states = hidden[:, row : row + 1, :length].flatten(2).nan_to_num()
        plane = Trajectory(list(depths), states, residual[:, row : row + 1, :length].mean(-1))
        path, explained = plane.principal_components(2)
        found.append(
            InspectedAnswer(
                tokens=tokens,
                probability=probability[:, row, :length],
                entropy=entropy[:, row, :length],
                residual=residual[:, row, :length],
                path=path[:, 0],
                explained=explained,
            )
        )
    return found


def _with_following(
    model: LoopedModel, state: LoopState, depths: Sequence[int]
) -> Iterator[tuple[LoopState, LoopState]]:
    """Yield the state at each depth and the one a step later, in one pass."""
    wanted, previous = set(depths), state
    for depth, current in enumerate(unroll(model, state, depths[-1] + 1)):
        if depth - 1 in wanted:
            yield previous, current
        previous = current


def _positions(state: LoopState, number: int) -> Tensor:
    """Return the states of the last tokens, float32 ``(B, number, D)``: a dict's parts one after the other."""
    leaves = [leaf[:, -number:].flatten(2) for leaf in pytree.tree_leaves(state.hidden)]
    return torch.cat(leaves, dim=-1).float()
