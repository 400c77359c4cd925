"""The parts of a transformer block: norm, rotary positions, attention, MLP, and the block with its norm placements.

Knows nothing of loops. Norms call torch's fused kernels; :func:`looplm.stability.jvp` replaces them by primitive
operations while it differentiates, because PyTorch's derivative of the fused LayerNorm is wrong there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looplm.config import LoopedConfig

__all__ = ["Attention", "Block", "FeedForward", "Norm", "rotary_angles", "rotate_half_split"]


class Norm(nn.Module):
    """Normalises the last dimension: LayerNorm, RMSNorm, or SimpleNorm (LayerNorm without gain and bias)."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.shape = (config.width,)
        self.eps = config.norm_eps
        self.centred = config.norm_type != "rms_norm"
        has_gain = config.norm_type != "simple_norm"
        self.weight = nn.Parameter(torch.ones(config.width)) if has_gain else None
        self.bias = nn.Parameter(torch.zeros(config.width)) if has_gain and self.centred else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, D)`` to ``(…, D)``."""
        if self.centred:
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.shape, self.weight, self.eps)


def rotary_angles(position_ids: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of ``position · theta^(−2j/d)``, each ``(B, 1, T, d/2)``, in float32 (RoFormer, eq. 15)."""
    exponents = torch.arange(0, head_width, 2, device=position_ids.device, dtype=torch.float32) / head_width
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature j of ``x`` ``(B, H, T, d)`` with feature j + d/2."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with grouped-query heads."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_width = config.num_heads, config.kv_heads, config.head_width
        self.dropout = config.dropout
        kv_width = self.num_kv_heads * self.head_width
        self.split_sizes = [config.width, kv_width, kv_width]
        self.qkv = nn.Linear(config.width, sum(self.split_sizes), bias=config.use_bias)
        self.out = nn.Linear(config.width, config.width, bias=config.use_bias)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend over earlier positions.

        Args:
            x: ``(B, T, D)``.
            mask: ``(B, 1, T, T)``, True where a query may see a key; None: plain causal attention.
            rotary: cos and sin, each ``(B or 1, 1, T, d/2)``, or None.

        Returns:
            ``(B, T, D)``.
        """
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, -1, self.head_width).transpose(1, 2)
            for part in self.qkv(x).split(self.split_sizes, dim=-1)
        )
        if rotary is not None:
            q, k = rotate_half_split(q, *rotary), rotate_half_split(k, *rotary)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    """The MLP of a block: GELU, or SwiGLU ``W_down(silu(W_gate x) · W_up x)``."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up = nn.Linear(config.width, config.ffn_width, bias=config.use_bias)
        self.gate = nn.Linear(config.width, config.ffn_width, bias=config.use_bias) if self.gated else None
        self.down = nn.Linear(config.ffn_width, config.width, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, D)`` to ``(…, D)``."""
        hidden = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)


class Block(nn.Module):
    """Attention, then MLP, each a sub-layer f with its norms placed as the config says (paper, section 3)."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.alpha = config.deepnorm_alpha
        self.dropout = nn.Dropout(config.dropout)
        self.attention = Attention(config)
        self.ffn = FeedForward(config)
        has_inner = config.norm_placement != "post_norm"
        has_outer = config.norm_placement != "pre_norm"
        self.attention_norm = Norm(config) if has_inner else nn.Identity()
        self.attention_out_norm = Norm(config) if has_outer else nn.Identity()
        self.ffn_norm = Norm(config) if has_inner else nn.Identity()
        self.ffn_out_norm = Norm(config) if has_outer else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``; for ``mask`` and ``rotary`` see :meth:`Attention.forward`."""
        branch = self.dropout(self.attention(self.attention_norm(x), mask, rotary))
        x = self._join(x, branch, self.attention_out_norm)
        branch = self.dropout(self.ffn(self.ffn_norm(x)))
        return self._join(x, branch, self.ffn_out_norm)

    def _join(self, x: Tensor, branch: Tensor, out_norm: nn.Module) -> Tensor:
        if self.placement == "pre_norm":  # x + f(N(x))
            return x + branch
        if self.placement == "sandwich_branch":  # x + N₂(f(N₁(x)))
            return x + out_norm(branch)
        if self.placement == "post_norm":  # N(α·x + f(x))
            return out_norm(x + branch if self.alpha == 1.0 else self.alpha * x + branch)
        return out_norm(x + branch)  # sandwich_dual: N₂(x + f(N₁(x)))
