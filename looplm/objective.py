"""The training loss: cross-entropy at a random depth and a stability term (paper, eq. 9).

Knows the contract of looped models, not the transformer, and nothing of Lightning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looplm.depth import DepthSampler
from looplm.loop import (
    CachedLoopedModel,
    Hidden,
    LastStepModel,
    LoopedModel,
    LoopState,
    SegmentLength,
    last_states,
    unroll,
)
from looplm.randomness import StepKey
from looplm.stability.penalty import Penalty
from looplm.stability.settling import SettlingPenalty

__all__ = ["ObjectiveOutput", "STARSObjective", "settling_term", "stability_term"]

_MOST_AGAIN = 0.5  # share of the sequences whose last step may run again before that costs what it spares


@dataclass(frozen=True, kw_only=True)
class ObjectiveOutput:
    """What one training step computed; tensors are scalars unless a shape is given.

    Example:
        >>> import torch
        >>> from looplm import FixedDepth, LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> tokens = torch.zeros(2, 3, dtype=torch.long)
        >>> objective = STARSObjective(depth_sampler=FixedDepth(4))
        >>> output = objective(model, {"input_ids": tokens, "labels": tokens}, StepKey(seed=0, micro_batch=0))
        >>> output.depth, output.penalty is None
        (4, True)
    """

    loss: Tensor
    """``(1 − λ)·cross_entropy + λ·penalty``."""
    cross_entropy: Tensor
    """Mean over the labelled tokens, in nats."""
    penalty: Tensor | None
    """The stability term, or None where λ is 0."""
    penalty_weight: float
    """λ in force."""
    depth: int
    """Number of loops that were run."""
    preds: Tensor
    """The likeliest token at each labelled position, −100 elsewhere; of the labels' shape."""
    num_preds: int
    """Labelled positions, over whose logits the loss was computed."""
    num_queries: int
    """Positions of the last loop's last block that were run, B·T unless ``spare_unlabelled``."""


@contextlib.contextmanager
def _deterministic(model: LoopedModel) -> Iterator[None]:
    """Switch dropout off for the duration."""
    active = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    try:
        for module in active:
            module.training = False
        yield
    finally:
        for module in active:
            module.training = True


@dataclass(frozen=True, kw_only=True)
class STARSObjective:
    """``L = (1 − λ)·L_CE(t) + λ·L_penalty(t)``, t drawn once a step.

    λ is 0 before ``penalty_start_step`` and then rises linearly over ``penalty_ramp_steps`` to ``penalty_weight``:
    ``λ(s) = penalty_weight · clip((s − start) / ramp, 0, 1)``, with s in optimiser steps.

    Raises:
        ValueError: If a value is outside its range, or has no effect because there is no penalty.

    Example:
        >>> from looplm import FixedDepth, JacobianPenalty
        >>> objective = STARSObjective(depth_sampler=FixedDepth(4), penalty=JacobianPenalty(), penalty_weight=0.1,
        ...                            penalty_start_step=100, penalty_ramp_steps=100)
        >>> [objective.weight_at(step) for step in (99, 150, 300)]
        [0.0, 0.05, 0.1]
    """

    depth_sampler: DepthSampler
    """The distribution of t."""
    penalty: Penalty | SettlingPenalty | None = None
    """The stability term; None: cross-entropy alone."""
    penalty_weight: float = 0.0
    """The final λ, in [0, 1]; the paper uses 0.1."""
    penalty_start_step: int = 0
    """Optimiser step at which λ leaves 0."""
    penalty_ramp_steps: int = 0
    """Length of the ramp, in optimiser steps; 0: λ jumps."""
    backprop_loops: int | None = None
    """Backpropagate through the last that many loops only; None: through all.

    Where t is larger, what only h₀ depends on (prelude, position table, token table of an untied head) gets no gradient
    unless the input is injected at every step.
    """
    checkpoint_loops: SegmentLength | None = None
    """Activation checkpointing: keep one state every that many loops and compute the rest again in the backward pass,
    once (1) or twice (more); ``sqrt``: every ⌈√t⌉; None: keep everything. See :func:`~looplm.loop.last_states`."""
    spare_unlabelled: bool = False
    """Run the last block of the last loop at labelled positions alone, if the model is a
    :class:`~looplm.loop.LastStepModel`: the same gradients. Worth its gathering where the core is a block or two and
    most tokens are a question; then it is a good part of a step. A penalty on at most half of the sequences computes
    their last states again, dropout drawn anew; with one on more of them nothing is spared."""

    def __post_init__(self) -> None:
        if not 0 <= self.penalty_weight <= 1:
            raise ValueError(f"`penalty_weight` (λ) must be in [0, 1], got {self.penalty_weight}.")
        if (self.penalty is None) != (self.penalty_weight == 0):
            term = None if self.penalty is None else type(self.penalty).__name__
            raise ValueError(
                f"`penalty` and `penalty_weight` go together, got {term} with `penalty_weight` {self.penalty_weight}."
            )
        for name in ("penalty_start_step", "penalty_ramp_steps"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"`{name}` must be >= 0, got {value}.")
            if value and self.penalty is None:
                raise ValueError(f"`{name}` has no effect without a `penalty`, got {value}.")
        if self.backprop_loops is not None and self.backprop_loops < 1:
            raise ValueError(f"`backprop_loops` must be >= 1, got {self.backprop_loops}.")
        length = self.checkpoint_loops
        if length is not None and length != "sqrt" and (isinstance(length, str) or length < 1):
            raise ValueError(f"`checkpoint_loops` must be >= 1, 'sqrt' or null, got {length!r}.")
        if self.spare_unlabelled and self.penalty_start_step == 0 and self._share_read > _MOST_AGAIN:
            raise ValueError(
                "`spare_unlabelled` has no effect with a `penalty` that reads the last states of more than half of the "
                f"sequences from the first step on, got {type(self.penalty).__name__} on {self._share_read:.0%}."
            )
        if length is not None and isinstance(self.penalty, SettlingPenalty):
            raise ValueError(f"`checkpoint_loops` must be null: a SettlingPenalty reads every state, got {length!r}.")

    @property
    def _share_read(self) -> float:
        """Share of the sequences whose last states the penalty reads."""
        return getattr(self.penalty, "fraction", 1.0) if self.penalty is not None else 0.0

    def weight_at(self, optimizer_step: int) -> float:
        """Return λ at an optimiser step."""
        since = optimizer_step - self.penalty_start_step
        if since < 0:
            return 0.0
        ramp = min(since / self.penalty_ramp_steps, 1.0) if self.penalty_ramp_steps else 1.0
        return self.penalty_weight * ramp

    def __call__(
        self, model: LoopedModel, batch: Mapping[str, Any], key: StepKey, num_labels: Tensor | None = None
    ) -> ObjectiveOutput:
        """Run the loops and the penalty on one micro-batch.

        Args:
            model: Any looped model.
            batch: ``input_ids`` (what ``embed`` takes), ``labels`` ``(B, …)`` aligned with the logits, −100 = ignored,
                and optionally ``attention_mask`` ``(B, T)``. A packed row counts as one sequence in the penalty.
            key: Names the micro-batch; all randomness derives from it.
            num_labels: Labelled tokens that the cross-entropy is a mean over, a scalar; None: those of this batch.
                Where gradients are averaged over processes or micro-batches, the mean number over these gives the mean
                over all tokens.
        """
        depth = self.depth_sampler.sample(key)
        labelled = batch["labels"] != -100
        weight = self.weight_at(key.optimizer_step)
        is_penalized = self.penalty is not None and weight > 0
        share = self._share_read if is_penalized else 0.0
        initial = model.embed(batch["input_ids"], batch.get("attention_mask"))
        state: LoopState | None
        # A question's tokens have no label: a large vocabulary's logits there would be a good part of a step.
        num_queries = labelled.numel()
        if self.spare_unlabelled and isinstance(model, LastStepModel) and depth > 0 and share <= _MOST_AGAIN:
            backprop_loops = None if self.backprop_loops is None else self.backprop_loops - 1
            _, previous = last_states(model, initial, depth - 1, backprop_loops, self.checkpoint_loops)
            last_step: Any = model.step_and_decode
            if self.checkpoint_loops is not None:
                last_step = partial(checkpoint, last_step, use_reentrant=False)
            logits, state, num_queries = last_step(previous, labelled)
        elif isinstance(self.penalty, SettlingPenalty) and is_penalized:
            states = list(unroll(model, initial, depth, self.backprop_loops))
            logits = _logits(model, states[-1], labelled)
        else:
            previous, last = last_states(model, initial, depth, self.backprop_loops, self.checkpoint_loops)
            state, logits = last, _logits(model, last, labelled)
        losses = F.cross_entropy(logits.float(), batch["labels"][labelled], reduction="sum")
        count = labelled.sum() if num_labels is None else num_labels
        cross_entropy = losses / count.masked_fill(count == 0, 1)  # a batch without labels gives 0, not NaN
        penalty = None
        loss = cross_entropy
        if self.penalty is not None and is_penalized:
            if isinstance(self.penalty, SettlingPenalty):
                first = 1 if self.backprop_loops is None else max(1, depth - self.backprop_loops)
                penalty = settling_term(self.penalty, model, states[first:], batch["labels"])
            else:
                penalty = stability_term(self.penalty, model, state, previous, key)
            loss = (1 - weight) * cross_entropy + weight * penalty
        return ObjectiveOutput(
            loss=loss,
            cross_entropy=cross_entropy.detach(),
            penalty=None if penalty is None else penalty.detach(),
            penalty_weight=weight,
            depth=depth,
            preds=torch.full_like(batch["labels"], -100).masked_scatter_(labelled, logits.detach().argmax(-1)),
            num_preds=len(logits),
            num_queries=num_queries,
        )


def stability_term(
    term: Penalty, model: LoopedModel, state: LoopState | None, previous: LoopState, key: StepKey
) -> Tensor:
    """Compute a penalty at a state, on the share of the sequences it asks for, dropout off.

    Args:
        term: The penalty.
        model: Any looped model.
        state: The final state h_t; None: a step from the one before, on the share alone.
        previous: The state before it.
        key: Names the micro-batch; rows and vectors derive from it.

    Returns:
        The term, a scalar.

    Example:
        >>> import torch
        >>> from looplm import JacobianPenalty, LoopedConfig, LoopedTransformer, unroll
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> before, last = list(unroll(model, model.embed(torch.zeros(2, 3, dtype=torch.long)), 3))[-2:]
        >>> stability_term(JacobianPenalty(), model, last, before, StepKey(seed=0, micro_batch=0)).shape
        torch.Size([])
    """
    mask = previous.context.get("attention_mask")
    batch_size, device = _leaf(previous).shape[0], _leaf(previous).device
    size = max(1, round(term.fraction * batch_size))
    if size < batch_size:
        rows = key.subset("penalty_rows", batch_size, size).to(device)
        previous = previous.select(rows)
        state = None if state is None else state.select(rows)
        mask = None if mask is None else mask[rows]
    last = model.step(previous) if state is None else state

    def step_fn(hidden: Any) -> Any:
        return model.step(LoopState(hidden, last.context, last.depth)).hidden

    with _deterministic(model):
        generator = key.generator("penalty_vector", device)
        return term(step_fn, last.hidden, previous.hidden, mask, generator)


def settling_term(term: SettlingPenalty, model: LoopedModel, states: Sequence[LoopState], labels: Tensor) -> Tensor:
    """Compute a settling penalty along a trajectory, at the labelled tokens.

    Args:
        term: The penalty.
        model: Any looped model with a state at every label.
        states: After consecutive loops; h₀, which has not been computed, is none of them.
        labels: ``(B, …)``, −100 = ignored.

    Returns:
        The term, a scalar; 0 of less than two states.

    Raises:
        ValueError: If a state is not ``(B, …, D)`` with the labels' shape in front.

    Example:
        >>> import torch
        >>> from looplm import LoopedConfig, LoopedTransformer, SettlingPenalty, unroll
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> tokens = torch.zeros(2, 3, dtype=torch.long)
        >>> settling_term(SettlingPenalty(), model, list(unroll(model, model.embed(tokens), 3))[1:], tokens).shape
        torch.Size([])
    """
    if len(states) < 2:
        return torch.zeros((), device=labels.device)
    labelled = labels != -100
    wanted = labels[labelled]
    trajectory = torch.stack([_at_labels(state.hidden, labelled) for state in states])
    with torch.no_grad(), _deterministic(model):
        is_right = torch.stack([_logits(model, state, labelled).argmax(-1) == wanted for state in states])
    return term(trajectory, is_right)


def _at_labels(hidden: Hidden, labelled: Tensor) -> Tensor:
    """Return the states at labelled positions, ``(N, D)``, parts of a dict side by side."""
    leaves = list(hidden.values()) if isinstance(hidden, dict) else [hidden]
    for leaf in leaves:
        if leaf.shape[: labelled.ndim] != labelled.shape:
            raise ValueError(
                f"a SettlingPenalty needs a state for each label, {(*labelled.shape, 'D')}, got {tuple(leaf.shape)}."
            )
    return torch.cat([leaf[labelled].flatten(1) for leaf in leaves], dim=-1)


def _logits(model: LoopedModel, state: LoopState, labelled: Tensor) -> Tensor:
    """Return the logits at labelled positions, ``(N, V)``."""
    if isinstance(model, CachedLoopedModel):
        return model.decode(state, logits_to_keep=labelled)
    return model.decode(state)[labelled]


def _leaf(state: LoopState) -> Tensor:
    hidden = state.hidden
    return next(iter(hidden.values())) if isinstance(hidden, dict) else hidden
