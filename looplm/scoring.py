"""What every depth says of given inputs: predictions and log-likelihoods, in one pass over the depths.

Knows the contract of looped models, not the transformer; generates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.loop import LoopedModel, unroll_at

__all__ = ["log_likelihoods_at_depths", "predictions_at_depths"]


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

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> predictions_at_depths(model.eval(), torch.zeros(2, 3, dtype=torch.long), [0, 4, 64]).shape
        torch.Size([3, 2, 3])
    """
    state = model.embed(inputs, attention_mask)
    return torch.stack([model.decode(reached).argmax(-1) for _, reached in unroll_at(model, state, depths)])


@torch.no_grad()
def log_likelihoods_at_depths(
    model: LoopedModel, inputs: Tensor, labels: Tensor, depths: Sequence[int], attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score labels at K depths in one pass of ``max(depths)`` steps.

    Args:
        model: Any looped model, in eval mode.
        inputs: What its ``embed`` takes, for example token ids ``(B, T)``.
        labels: ``(B, T)`` aligned with the logits: ``labels[b, i]`` is what follows ``inputs[b, i]``; −100: ignored.
        depths: K strictly increasing depths.
        attention_mask: ``(B, T)``, non-zero at real positions, or None.

    Returns:
        The labels' log-probabilities in nats, float ``(K, B, T)``, 0 where ignored; and whether each is the likeliest
        token, bool ``(K, B, T)``, true where ignored.

    Raises:
        ValueError: If ``depths`` is empty, negative or not strictly increasing.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> text = torch.tensor([[1, 2, 3]])
        >>> scores, greedy = log_likelihoods_at_depths(model.eval(), text[:, :-1], text[:, 1:], [1, 4])
        >>> scores.shape  # depths, rows, positions
        torch.Size([2, 1, 2])
    """
    scores, right = [], []
    for _, reached in unroll_at(model, model.embed(inputs, attention_mask), depths):
        logits = model.decode(reached)
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        scores.append(-losses.view_as(labels))
        right.append((logits.argmax(-1) == labels) | (labels == -100))
    return torch.stack(scores), torch.stack(right)
