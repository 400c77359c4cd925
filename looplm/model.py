"""The looped transformer. Knows nothing of text, losses or training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looplm.config import LoopedConfig
from looplm.layers import Block, Norm, rotary_angles
from looplm.loop import Hidden, LoopState, unroll_at

__all__ = ["LoopedTransformer"]


class LoopedTransformer(nn.Module):
    """A causal transformer whose core blocks are applied ``num_loops`` times: prelude, core (looped), coda.

    Fulfils :class:`~looplm.loop.LoopedModel`. Shapes: token ids ``(B, T)``, latent state ``(B, T, D)``,
    logits ``(B, T, V)``.

    Example:
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> model(torch.zeros(2, 5, dtype=torch.long), num_loops=3).shape
        torch.Size([2, 5, 11])
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        has_table = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_positions, config.width) if has_table else None
        self.dropout = nn.Dropout(config.dropout)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.num_prelude_layers))
        self.core = nn.ModuleList(Block(config) for _ in range(config.num_core_layers))
        self.coda = nn.ModuleList(Block(config) for _ in range(config.num_coda_layers))
        has_adapter = config.input_injection == "linear"
        self.injection = nn.Linear(2 * config.width, config.width, bias=False) if has_adapter else None
        self.final_norm = Norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(
        self, inputs: Tensor, attention_mask: Tensor | None = None, initial_hidden: Hidden | None = None
    ) -> LoopState:
        """Embed token ids and run the prelude.

        Args:
            inputs: Token ids, ``(B, T)``.
            attention_mask: ``(B, T)``, non-zero at real positions; padding may stand left or right. None: no padding.
            initial_hidden: h₀ in place of the prelude's output, ``(B, T, D)``.

        Returns:
            The state h₀ ``(B, T, D)`` and the context of every step.

        Raises:
            ValueError: If the sequence is longer than ``max_positions`` or the mask has another shape.
        """
        batch, length = inputs.shape
        if length > self.config.max_positions:
            raise ValueError(f"a sequence may have {self.config.max_positions} tokens (`max_positions`), got {length}.")
        if attention_mask is not None and attention_mask.shape != inputs.shape:
            raise ValueError(f"`attention_mask` must be {tuple(inputs.shape)}, got {tuple(attention_mask.shape)}.")
        real = None if attention_mask is None else attention_mask.bool()
        position_ids = torch.arange(length, device=inputs.device).expand(batch, -1)
        mask = None
        # Causal attention never looks right, so only padding on the left (or inside) needs a mask of its own.
        if real is not None and bool((real[:, 1:] & ~real[:, :-1]).any()):
            position_ids = (real.long().cumsum(1) - 1).clamp(min=0)
            mask = real[:, None, None, :] & torch.ones(length, length, dtype=torch.bool, device=inputs.device).tril()
            # A padded query would see nothing at all, and softmax over nothing is NaN: it sees itself.
            mask = mask | torch.eye(length, dtype=torch.bool, device=inputs.device)
        context: dict[str, Any] = {"attention_mask": real, "mask": mask, "rotary": None}
        hidden = self.token_embedding(inputs)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(position_ids)
        else:
            rows = position_ids if mask is not None else position_ids[:1]
            context["rotary"] = rotary_angles(rows, self.config.head_width, self.config.rope_theta)
        hidden = self._blocks(self.prelude, self.dropout(hidden), context)
        context["injected"] = None if self.config.input_injection == "none" else hidden
        return LoopState(hidden if initial_hidden is None else initial_hidden, context)

    def step(self, state: LoopState) -> LoopState:
        """Apply Φ once: inject the input, then the core blocks; ``(B, T, D)`` to ``(B, T, D)``."""
        hidden: Any = state.hidden
        injected = state.context["injected"]
        if self.injection is not None:
            hidden = self.injection(torch.cat([hidden, injected], dim=-1))
        elif injected is not None:
            hidden = hidden + injected
        return state.advance(self._blocks(self.core, hidden, state.context))

    def decode(self, state: LoopState) -> Tensor:
        """Coda, final norm and head: return logits ``(B, T, V)``."""
        hidden = self.final_norm(self._blocks(self.coda, state.hidden, state.context))
        return F.linear(hidden, self.token_embedding.weight if self.head is None else self.head.weight)

    def forward(self, inputs: Tensor, num_loops: int, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits ``(B, T, V)`` after ``num_loops`` steps."""
        ((_, state),) = unroll_at(self, self.embed(inputs, attention_mask), [num_loops])
        return self.decode(state)

    def _blocks(self, blocks: nn.ModuleList, hidden: Any, context: Any) -> Tensor:
        for block in blocks:
            hidden = block(hidden, context["mask"], context["rotary"])
        return hidden
