"""Greedy decoding at a given depth. Knows the contract of looped models, not the transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from looplm.loop import LoopedModel, unroll_at

__all__ = ["generate", "predictions_at_depths"]


@torch.no_grad()
def predictions_at_depths(
    model: LoopedModel, inputs: Tensor, depths: Sequence[int], attention_mask: Tensor | None = None
) -> Tensor:
    """Return the most likely next token at every position and depth, in one pass of ``max(depths)`` steps.

    Args:
        model: Any looped model, in eval mode.
        inputs: What its ``embed`` takes, for example token ids ``(B, T)``.
        depths: K strictly increasing depths.
        attention_mask: ``(B, T)``, non-zero at real positions, or None.

    Returns:
        int64 ``(K, B, …)``.

    Raises:
        ValueError: If ``depths`` is empty, negative or not strictly increasing.
    """
    state = model.embed(inputs, attention_mask)
    return torch.stack([model.decode(reached).argmax(-1) for _, reached in unroll_at(model, state, depths)])


@torch.no_grad()
def generate(
    model: LoopedModel,
    tokens: Tensor,
    *,
    num_loops: int,
    max_new_tokens: int,
    end_id: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Continue prompts greedily, re-running the model for every token.

    Args:
        model: Any looped model over token ids, in eval mode.
        tokens: Prompts, int64 ``(B, T)``, padded on the left where ``attention_mask`` ``(B, T)`` is zero.
        num_loops: Depth of every token.
        max_new_tokens: Longest continuation.
        end_id: Id that ends a continuation.
        attention_mask: Non-zero at real positions; None: no padding.

    Returns:
        The continuations, int64 ``(B, N)``, N ≤ ``max_new_tokens``; after its end a row holds ``end_id``.

    Raises:
        ValueError: If ``max_new_tokens`` is below 1 or ``num_loops`` below 0.
    """
    if max_new_tokens < 1 or num_loops < 0:
        raise ValueError(f"`max_new_tokens` must be >= 1 and `num_loops` >= 0, got {max_new_tokens} and {num_loops}.")
    length = tokens.shape[1]
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        following = predictions_at_depths(model, tokens, [num_loops], attention_mask)[0, :, -1]
        following = following.masked_fill(finished, end_id)
        tokens = torch.cat([tokens, following[:, None]], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
        finished |= following == end_id
        if bool(finished.all()):
            break
    return tokens[:, length:]
