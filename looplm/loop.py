"""The contract that everything in looplm is written against: embed, step, decode.

Knows nothing of transformers, text or training: any module with these three methods is a looped model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

__all__ = [
    "CachedLoopedModel",
    "Hidden",
    "LastStepModel",
    "LoopState",
    "LoopedModel",
    "SegmentLength",
    "check_depths",
    "last_states",
    "unroll",
    "unroll_at",
]

Hidden: TypeAlias = Tensor | dict[str, Tensor]
"""A latent state: one tensor ``(B, …)`` or a dict of them."""

SegmentLength: TypeAlias = int | Literal["sqrt"]
"""Loops between two states that are kept: a number, or ``sqrt``: ⌈√t⌉ of the t loops that are differentiated."""


@dataclass(frozen=True)
class LoopState:
    """A latent state and what a step needs beside it.

    Attributes:
        hidden: The latent state, ``(B, …)``, usually ``(B, T, D)``, or a dict of such tensors.
        context: What every step reads and none changes (injected embedding, positions, masks). Each tensor in it
            has a leading dimension of B (one row a sample) or 1 (shared by all samples). The entry
            ``attention_mask`` ``(B, T)``, where there is one, tells real positions (non-zero) from padding. (What
            ``embed`` takes may hold document numbers in packed rows; attention and positions follow from them there.)
        depth: How many steps have been applied.

    Example:
        >>> state = LoopState(torch.zeros(2, 3, 4))
        >>> state.advance(torch.ones(2, 3, 4)).depth
        1
    """

    hidden: Hidden
    context: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 0

    def advance(self, hidden: Hidden) -> LoopState:
        """Return the state one step later, with the same context."""
        return replace(self, hidden=hidden, depth=self.depth + 1)

    def detach(self) -> LoopState:
        """Return the same state without its gradient history (the context keeps its own)."""
        return replace(self, hidden=pytree.tree_map(lambda x: x.detach(), self.hidden))

    def select(self, indices: Tensor) -> LoopState:
        """Return the samples ``indices`` ``(n,)`` of this batch; shared context (leading dimension 1) stays."""

        def rows(x: Any) -> Any:
            return x[indices] if isinstance(x, Tensor) and x.shape[0] > 1 else x

        return replace(
            self,
            hidden=pytree.tree_map(lambda x: x[indices], self.hidden),
            context=pytree.tree_map(rows, dict(self.context)),
        )


@runtime_checkable
class LoopedModel(Protocol):
    """Three functions that make a looped model: ``h₀ = embed(inputs)``, ``h_{t+1} = step(h_t)``, ``decode(h_t)``.

    Example:
        >>> class Halving:
        ...     def embed(self, inputs, attention_mask=None, initial_hidden=None):
        ...         return LoopState(inputs, {})
        ...     def step(self, state):
        ...         return state.advance(0.5 * state.hidden)
        ...     def decode(self, state):
        ...         return state.hidden
        >>> isinstance(Halving(), LoopedModel)
        True
    """

    def embed(
        self, inputs: Any, attention_mask: Tensor | None = None, initial_hidden: Hidden | None = None
    ) -> LoopState:
        """Prelude: return h₀ (or ``initial_hidden`` in its place) and the context of every step."""
        ...

    def step(self, state: LoopState) -> LoopState:
        """Apply Φ once: the same weights at every depth, pure in its input, ``depth + 1``."""
        ...

    def decode(self, state: LoopState) -> Tensor:
        """Coda, final norm and head: return ``(B, …, V)``."""
        ...


@runtime_checkable
class CachedLoopedModel(LoopedModel, Protocol):
    """A looped model that can remember earlier tokens: ``embed``, ``step`` and ``decode`` take what it makes.

    Without the cache each behaves as :class:`LoopedModel` says. What a cache is, is the model's own affair; generation
    asks of it what :class:`~looplm.cache.LoopKVCache` offers.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> isinstance(model, CachedLoopedModel)
        True
    """

    def make_cache(self, batch_size: int, max_tokens: int, num_loops: int, policy: str = "per_loop") -> Any:
        """Return an empty cache for that many rows, tokens (padding included) and loops."""
        ...

    def embed(
        self,
        inputs: Any,
        attention_mask: Tensor | None = None,
        initial_hidden: Hidden | None = None,
        cache: Any = None,
    ) -> LoopState:
        """Like :meth:`LoopedModel.embed`, for the tokens after those in the cache."""
        ...

    def step(self, state: LoopState, cache: Any = None) -> LoopState:
        """Like :meth:`LoopedModel.step`, with the keys and values of loop ``state.depth``."""
        ...

    def decode(self, state: LoopState, cache: Any = None, logits_to_keep: int | Tensor | None = None) -> Tensor:
        """Like :meth:`LoopedModel.decode`, for the last positions alone, or those of a bool ``(B, T)``, where given."""
        ...


@runtime_checkable
class LastStepModel(Protocol):
    """A looped model that can spare itself what only the states after the last step would need.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> isinstance(model, LastStepModel)
        True
    """

    def step_and_decode(self, state: LoopState, logits_to_keep: Tensor) -> tuple[Tensor, LoopState | None, int]:
        """Return ``decode(step(state))`` where a bool ``(B, T)`` is True, ``(N, V)``, and what was run for it.

        That is ``step(state)``, or None where a part of it was spared, and the number of the last block's queries, then
        less than B·T.
        """
        ...


def check_depths(name: str, depths: Sequence[int]) -> list[int]:
    """Return ``depths`` as a list.

    Raises:
        ValueError: If they are none, negative or not strictly increasing; the message calls them ``name``.

    Example:
        >>> check_depths("depths", (1, 4, 16))
        [1, 4, 16]
    """
    if not depths:
        raise ValueError(f"`{name}` must name at least one depth, got {list(depths)}.")
    if depths[0] < 0 or any(a >= b for a, b in pairwise(depths)):
        raise ValueError(f"`{name}` must be non-negative and strictly increasing, got {list(depths)}.")
    return list(depths)


def unroll(
    model: LoopedModel, state: LoopState, num_loops: int, backprop_loops: int | None = None
) -> Iterator[LoopState]:
    """Yield ``num_loops + 1`` states; the first is h₀, so the index of a state is its depth.

    Args:
        model: Any looped model.
        state: Where to start.
        num_loops: How many steps to apply, at least 0.
        backprop_loops: Record gradients for the last that many steps only (truncated backpropagation); None: for all.

    Yields:
        ``state`` itself, then the state after every step.

    Raises:
        ValueError: If ``num_loops`` is negative.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> [state.depth for state in unroll(model, model.embed(torch.zeros(1, 3, dtype=torch.long)), num_loops=3)]
        [0, 1, 2, 3]
    """
    if num_loops < 0:
        raise ValueError(f"`num_loops` must be >= 0, got {num_loops}.")
    frozen_loops = 0 if backprop_loops is None else max(num_loops - backprop_loops, 0)
    yield state
    for index in range(num_loops):
        if index < frozen_loops:
            with torch.no_grad():
                # Detached, since compiled code would tell a state with a history from one without.
                state = model.step(state.detach())
        else:
            state = model.step(state)
        yield state


def unroll_at(model: LoopedModel, state: LoopState, depths: Sequence[int]) -> Iterator[tuple[int, LoopState]]:
    """Yield ``(depth, state)`` at each of ``depths``, in one pass of ``max(depths)`` steps.

    Args:
        model: Any looped model.
        state: A state at depth 0.
        depths: Strictly increasing depths, the first at least 0.

    Raises:
        ValueError: If ``depths`` is empty, negative or not strictly increasing.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> state = model.embed(torch.zeros(1, 3, dtype=torch.long))
        >>> [(depth, reached.depth) for depth, reached in unroll_at(model, state, [0, 4])]
        [(0, 0), (4, 4)]
    """
    wanted = iter(check_depths("depths", depths))
    target = next(wanted)
    for depth, current in enumerate(unroll(model, state, depths[-1])):
        if depth == target:
            yield depth, current
            target = next(wanted, -1)


def last_states(
    model: LoopedModel,
    state: LoopState,
    num_loops: int,
    backprop_loops: int | None = None,
    checkpoint_loops: SegmentLength | None = None,
) -> tuple[LoopState, LoopState]:
    """Return the last two states of :func:`unroll`; without a loop both are ``state``.

    With ``checkpoint_loops`` the backward pass runs loops again instead of keeping what is in them, with the same
    gradients, dropout included. Segments of one loop: one more forward pass, in the memory of a state a loop and one
    loop. Longer ones: two more, in the memory of a state a segment, a state for each loop of one segment, and one loop;
    ``sqrt`` makes that least (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

    Args:
        model: Any looped model.
        state: Where to start.
        num_loops: How many steps to apply, at least 0.
        backprop_loops: See :func:`unroll`.
        checkpoint_loops: Loops a segment; None: everything is kept.

    Returns:
        The state before the last and the last.

    Example:
        >>> class Halving:
        ...     def step(self, state):
        ...         return state.advance(state.hidden / 2)
        >>> previous, last = last_states(Halving(), LoopState(torch.ones(1)), 3, checkpoint_loops="sqrt")
        >>> previous.hidden.item(), last.hidden.item(), last.depth
        (0.25, 0.125, 3)
    """
    previous = state
    frozen_loops = 0 if backprop_loops is None else max(num_loops - backprop_loops, 0)
    if checkpoint_loops is None or not torch.is_grad_enabled():
        return _last_two(unroll(model, state, num_loops, backprop_loops), previous)
    if frozen_loops:
        previous, state = _last_two(unroll(model, state, frozen_loops, 0), previous)
    left = num_loops - frozen_loops
    length = math.ceil(math.sqrt(left)) if checkpoint_loops == "sqrt" else checkpoint_loops
    while left > 0:
        size = min(length, left)
        before = state

        def segment(hidden: Hidden, before: LoopState = before, size: int = size) -> tuple[Hidden, Hidden]:
            earlier = later = hidden
            for index in range(size):
                step = partial(_step_hidden, model, replace(before, depth=before.depth + index))
                # A segment of several that runs again keeps a state a loop, not what is in its loops.
                following = step(later) if size == 1 else checkpoint(step, later, use_reentrant=False)
                earlier, later = later, following
            return earlier, later

        # The context is read from the closure: saved-tensor hooks find it there, and its gradient is exact.
        hidden, last = checkpoint(segment, before.hidden, use_reentrant=False)
        previous = replace(before, hidden=hidden, depth=before.depth + size - 1)
        state = replace(before, hidden=last, depth=before.depth + size)
        left -= size
    return previous, state


def _step_hidden(model: LoopedModel, before: LoopState, hidden: Hidden) -> Hidden:
    return model.step(replace(before, hidden=hidden)).hidden


def _last_two(states: Iterator[LoopState], previous: LoopState) -> tuple[LoopState, LoopState]:
    kept = deque([previous, previous], maxlen=2)
    for index, state in enumerate(states):
        if index > 0:
            kept.append(state)
    return kept[0], kept[1]
