"""The authors' way of training and evaluating, written plainly: what our steps and curves are timed against.

Explicit attention, one ``vᵀJ`` with one vector for the batch and a double backward, answers written token by token with
the whole sequence computed again (arXiv 2605.26733 and its released code). Takes its weights from our model, so that
both compute the same function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looplm.model import LoopedTransformer

__all__ = ["PlainLoopedTransformer", "plain_answer", "plain_loss"]


class _UnfusedLayerNorm(nn.LayerNorm):
    """The same function in primitive operations."""

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return normed * self.weight + self.bias


class _PlainBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, ffn_width: int, norm: type[nn.LayerNorm]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(norm(width) for _ in range(4))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, ffn_width), nn.Linear(ffn_width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        normed = self.norms[0](x)
        q, k, v = (
            part(normed).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, width)
        x = self.norms[1](x + self.out(mixed))
        return self.norms[3](x + self.down(F.gelu(self.up(self.norms[2](x)))))


class PlainLoopedTransformer(nn.Module):
    """Post-Sandwich LayerNorm, one block looped, learned positions, tied head, no dropout; weights of ``source``.

    Norms are torch's kernel, as in the released code, or with ``fused_norms=False`` primitive operations like the rest.
    """

    def __init__(self, source: LoopedTransformer, fused_norms: bool = True) -> None:
        super().__init__()
        config = source.config
        norm = nn.LayerNorm if fused_norms else _UnfusedLayerNorm
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.block = _PlainBlock(config.width, config.num_heads, config.ffn_width, norm)
        self.norm = norm(config.width)
        (theirs,) = source.core
        state = {"tokens": source.token_embedding, "positions": source.position_embedding, "norm": source.final_norm}
        norms = (theirs.attention_norm, theirs.attention_out_norm, theirs.ffn_norm, theirs.ffn_out_norm)
        state |= {f"block.norms.{index}": norm for index, norm in enumerate(norms)}
        state |= {"block.out": theirs.attention.out, "block.up": theirs.ffn.up, "block.down": theirs.ffn.down}
        weights = {f"{name}.{key}": value for name, part in state.items() for key, value in part.state_dict().items()}
        for key, value in theirs.attention.qkv.state_dict().items():
            parts = value.chunk(3)
            weights |= {
                f"block.{name}.{key}": part for name, part in zip(("query", "key", "value"), parts, strict=True)
            }
        self.load_state_dict(weights)

    def states(self, tokens: Tensor, num_loops: int) -> tuple[Tensor, Tensor]:
        """Return the state after ``num_loops`` loops, ``(B, T, D)``, and the mask, True where nothing may be seen."""
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden = self.tokens(tokens) + self.positions(torch.arange(length))
        for _ in range(num_loops):
            hidden = self.block(hidden, mask)
        return hidden, mask

    def decode(self, hidden: Tensor) -> Tensor:
        return F.linear(self.norm(hidden), self.tokens.weight)


def plain_loss(model: PlainLoopedTransformer, tokens: Tensor, labels: Tensor, num_loops: int, weight: float) -> Tensor:
    """Return ``(1 − λ)·cross-entropy + λ·‖vᵀJ‖²`` at depth ``num_loops``."""
    hidden, mask = model.states(tokens, num_loops)
    cross_entropy = F.cross_entropy(model.decode(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100)
    state = hidden.detach().requires_grad_()
    vector = torch.randn_like(state)
    vector = vector / vector.norm()
    (product,) = torch.autograd.grad(model.block(state, mask), state, vector, create_graph=True)
    return (1 - weight) * cross_entropy + weight * product.square().sum()


@torch.no_grad()
def plain_answer(model: PlainLoopedTransformer, prompt: Tensor, num_tokens: int, num_loops: int) -> Tensor:
    """Return the greedy continuation ``(num_tokens,)`` of one prompt ``(P,)``, everything computed anew a token."""
    tokens = prompt[None]
    for _ in range(num_tokens):
        hidden, _ = model.states(tokens, num_loops)
        tokens = torch.cat([tokens, model.decode(hidden)[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :]
