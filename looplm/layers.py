"""The parts of a transformer block: norm, rotary positions, attention, MLP, and the block with its norm placements.

Knows nothing of loops; what is remembered of earlier tokens comes from :mod:`looplm.cache`. Norms call torch's fused
kernels; :func:`looplm.stability.jvp` replaces them by primitive operations while it differentiates, because PyTorch's
derivative of the fused LayerNorm is wrong there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looplm.cache import KVSlot
from looplm.config import LoopedConfig

__all__ = [
    "Attention",
    "Block",
    "DiagonalInjection",
    "FeedForward",
    "KeptPositions",
    "Norm",
    "rotary_angles",
    "rotate_half_split",
    "rotate_interleaved",
]


class Norm(nn.Module):
    """Normalises the last dimension: LayerNorm, RMSNorm, or SimpleNorm (LayerNorm without gain and bias).

    Example:
        >>> norm = Norm(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, norm_type="rms_norm"))
        >>> round(norm(torch.full((1, 1, 16), 3.0)).mean().item(), 4)
        1.0
    """

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
        if self.weight is not None and x.dtype != self.weight.dtype:
            # Autocast, which does so with LayerNorm by itself and leaves RMSNorm to a slower kernel.
            x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        elif self.weight is not None and x.dtype in (torch.bfloat16, torch.float16):
            # As Ouro and Huginn were trained: the normed value is rounded before the gain multiplies it.
            return F.rms_norm(x, self.shape, None, self.eps) * self.weight
        return F.rms_norm(x, self.shape, self.weight, self.eps)


def rotary_angles(position_ids: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of ``position · theta^(−2j/d)``, each ``(B, 1, T, d/2)``, in float32 (RoFormer, eq. 15).

    Example:
        >>> cos, sin = rotary_angles(torch.arange(5)[None], head_width=8, theta=10_000.0)
        >>> cos.shape
        torch.Size([1, 1, 5, 4])
    """
    exponents = torch.arange(0, head_width, 2, device=position_ids.device, dtype=torch.float32) / head_width
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature j of ``x`` ``(B, H, T, d)`` with feature j + d/2.

    Example:
        >>> x = torch.tensor([[[[1.0, 0.0]]]])
        >>> rotate_half_split(x, torch.tensor([[[[0.0]]]]), torch.tensor([[[[1.0]]]])).tolist()  # a right angle
        [[[[0.0, 1.0]]]]
    """
    cos, sin = torch.cat([cos, cos], dim=-1).to(x.dtype), torch.cat([-sin, sin], dim=-1).to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature 2j of ``x`` ``(B, H, T, d)`` with feature 2j + 1.

    Example:
        >>> x = torch.tensor([[[[1.0, 0.0]]]])
        >>> rotate_interleaved(x, torch.tensor([[[[0.0]]]]), torch.tensor([[[[1.0]]]])).tolist()  # a right angle
        [[[[0.0, 1.0]]]]
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


@dataclass(frozen=True)
class KeptPositions:
    """Some positions of every row, in their order; rows with fewer than others are filled with other positions.

    Attributes:
        index: Int64 ``(B, Q)``.
        real: Bool ``(B, Q)``, False at what fills a row.

    Example:
        >>> kept = KeptPositions.of(torch.tensor([[False, True, True], [False, False, True]]))
        >>> kept.index.tolist(), kept.real.tolist()
        ([[1, 2], [2, 0]], [[True, True], [True, False]])
    """

    index: Tensor
    real: Tensor

    @classmethod
    def of(cls, where: Tensor) -> KeptPositions:
        """Return the positions where a bool ``(B, T)`` is True."""
        counts = where.sum(1)
        index = (~where).byte().argsort(dim=1, stable=True)[:, : int(counts.max())]
        return cls(index, torch.arange(index.shape[1], device=where.device) < counts[:, None])

    def gather(self, x: Tensor) -> Tensor:
        """Map ``(B or 1, T, …)`` to ``(B, Q, …)``."""
        rest = x.shape[2:]
        index = self.index.view(*self.index.shape, *(1 for _ in rest)).expand(-1, -1, *rest)
        return x.expand(len(self.index), *x.shape[1:]).gather(1, index)

    def mask(self, mask: Tensor | None, length: int) -> Tensor:
        """Return the rows ``(B, 1, Q, S)`` of an attention mask ``(B or 1, 1, T, S)``; None: of the causal one."""
        if mask is not None:
            return self.gather(mask[:, 0])[:, None]
        return (torch.arange(length, device=self.index.device) <= self.index[..., None])[:, None]


class Attention(nn.Module):
    """Causal self-attention with grouped-query heads.

    Example:
        >>> attention = Attention(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2))
        >>> attention(torch.zeros(2, 5, 16), None, None).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_width = config.num_heads, config.kv_heads, config.head_width
        self.dropout = config.dropout
        self.rotate = rotate_interleaved if config.rotary_pairs == "interleaved" else rotate_half_split
        q_width, kv_width = self.num_heads * self.head_width, self.num_kv_heads * self.head_width
        self.split_sizes = [q_width, kv_width, kv_width]
        self.qkv = nn.Linear(config.width, sum(self.split_sizes), bias=config.use_bias)
        self.out = nn.Linear(q_width, config.width, bias=config.use_bias)
        self.q_bias = nn.Parameter(torch.zeros(self.num_heads, self.head_width)) if config.qk_bias else None
        self.k_bias = nn.Parameter(torch.zeros(self.num_kv_heads, self.head_width)) if config.qk_bias else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        slot: KVSlot | None = None,
        kept: KeptPositions | None = None,
    ) -> Tensor:
        """Attend over earlier positions.

        Args:
            x: ``(B, T, D)``.
            mask: ``(B or 1, 1, T, S)``, True where a query may see a key; None: plain causal attention, or, where a
                slot holds earlier tokens, attention to all keys.
            rotary: cos and sin, each ``(B or 1, 1, T, d/2)``, or None.
            slot: Keys and values of earlier tokens, to which those of ``x`` are added; None: S = T.
            kept: Query from these positions alone; without a slot.

        Returns:
            ``(B, T, D)``, or ``(B, Q, D)``.
        """
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, part.shape[1], -1, self.head_width).transpose(1, 2) for part in self._project(x, kept)
        )
        if self.q_bias is not None and self.k_bias is not None:
            q, k = q + self.q_bias[:, None], k + self.k_bias[:, None]
        if rotary is not None:
            at_queries = rotary if kept is None else tuple(kept.gather(part[:, 0])[:, None] for part in rotary)
            q, k = self.rotate(q, *at_queries), self.rotate(k, *rotary)
        if kept is not None:
            mask = kept.mask(mask, length)
        if slot is not None:
            k, v = slot.append(k, v)
        attend = partial(
            _plain_attention if _is_better_compiled(q, k) else F.scaled_dot_product_attention,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and k.shape[2] == length,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        if _is_slow_to_differentiate(q, k):
            with torch.autocast(q.device.type, enabled=False):
                mixed = attend(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            mixed = attend(q, k, v)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, q.shape[2], -1))
        return output

    def _project(self, x: Tensor, kept: KeptPositions | None) -> tuple[Tensor, ...]:
        """Return queries, keys and values, heads side by side."""
        if kept is None:
            return torch.split(self.qkv(x), self.split_sizes, dim=-1)
        q_width, kv_width = self.split_sizes[0], 2 * self.split_sizes[1]
        weights = self.qkv.weight.split([q_width, kv_width])
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split([q_width, kv_width])
        k_and_v = F.linear(x, weights[1], biases[1]).split(self.split_sizes[1:], dim=-1)
        return (F.linear(kept.gather(x), weights[0], biases[0]), *k_and_v)


def _is_slow_to_differentiate(q: Tensor, k: Tensor) -> bool:
    # Measured with torch 2.13: a CPU's backward pass in bfloat16 takes ten times that in float32 at 16 keys, twice at
    # 256, and less from 1,024 on.
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and k.shape[2] <= 512


def _is_better_compiled(q: Tensor, k: Tensor) -> bool:
    # Measured with torch 2.13, forward and backward: the compiler fuses a softmax over 16 keys with what surrounds it,
    # in two thirds to three quarters of the kernel's time; at 64 keys in as much.
    return torch.compiler.is_compiling() and q.device.type == "cpu" and k.shape[2] <= 32


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """Return what ``F.scaled_dot_product_attention`` does where every query sees a key, operation by operation."""
    if enable_gqa:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    if is_causal:
        position = torch.arange(k.shape[2], device=q.device)
        attn_mask = position[:, None] >= position
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout_p) @ v


class FeedForward(nn.Module):
    """The MLP of a block: GELU, or SwiGLU ``W_down(silu(W_gate x) · W_up x)``.

    Example:
        >>> config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32)
        >>> FeedForward(config)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.up = nn.Linear(config.width, config.ffn_width, bias=config.use_bias)
        self.gate = nn.Linear(config.width, config.ffn_width, bias=config.use_bias) if self.gated else None
        self.down = nn.Linear(config.ffn_width, config.width, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, D)`` to ``(…, D)``."""
        hidden = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        output: Tensor = self.down(hidden)
        return output


class Block(nn.Module):
    """Attention, then MLP, each a sub-layer f with its norms placed as the config says (paper, section 3).

    Example:
        >>> config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, norm_placement="post_norm")
        >>> block = Block(config)
        >>> block(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

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

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        slot: KVSlot | None = None,
        kept: KeptPositions | None = None,
    ) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)`` or ``(B, Q, D)``; for the rest see :meth:`Attention.forward`."""
        branch = self.dropout(self.attention(self.attention_norm(x), mask, rotary, slot, kept))
        x = self._join(x if kept is None else kept.gather(x), branch, self.attention_out_norm)
        branch = self.dropout(self.ffn(self.ffn_norm(x)))
        return self._join(x, branch, self.ffn_out_norm)

    def _join(self, x: Tensor, branch: Tensor, out_norm: nn.Module) -> Tensor:
        if self.placement == "pre_norm":  # x + f(N(x))
            return x + branch
        joined: Tensor
        if self.placement == "sandwich_branch":  # x + N₂(f(N₁(x)))
            joined = x + out_norm(branch)
        elif self.placement == "post_norm":  # N(α·x + f(x))
            joined = out_norm(x + branch if self.alpha == 1.0 else self.alpha * x + branch)
        else:  # sandwich_dual: N₂(x + f(N₁(x)))
            joined = out_norm(x + branch)
        return joined


class DiagonalInjection(nn.Module):
    """``Ā h + Δ B e`` with ``Ā = exp(−Δ·exp(a))`` and Δ = softplus(δ), a and δ one number a feature (Parcae).

    A continuous system with a negative diagonal, discretised: every entry of Ā lies in (0, 1), so that what the loop
    carries over by this path decays, whatever training makes of a and δ.

    Example:
        >>> config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, input_injection="diagonal")
        >>> injection = DiagonalInjection(config)
        >>> bool((injection.decay() < 1).all())
        True
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(config.width))
        self.raw_step = nn.Parameter(torch.zeros(config.width))
        self.input = nn.Linear(config.width, config.width, bias=False)

    def decay(self) -> Tensor:
        """Return the diagonal of Ā, ``(D,)``."""
        return torch.exp(-F.softplus(self.raw_step) * self.log_rate.exp())

    def forward(self, hidden: Tensor, injected: Tensor) -> Tensor:
        """Map the state h and the input e, both ``(B, T, D)``, to ``(B, T, D)``."""
        driven: Tensor = F.softplus(self.raw_step) * self.input(injected)
        return self.decay() * hidden + driven
