"""Huginn's table of cosines and sines, which its directories hold though it follows from the config."""

from __future__ import annotations

import torch
from torch import Tensor

from looplm.config import LoopedConfig

__all__ = ["ROTARY_TABLE", "is_rotary_table", "rotary_table", "rotary_table_shape"]

ROTARY_TABLE = "freqs_cis"
"""The tensor's name."""


def rotary_table_shape(config: LoopedConfig) -> tuple[int, ...]:
    """Return the table's shape without making it, which a wrong config could let grow beyond the memory.

    Example:
        >>> rotary_table_shape(LoopedConfig.huginn_3_5b())
        (1, 4096, 1, 48, 2)
    """
    return (1, config.max_positions, 1, config.head_width // 2, 2)


def rotary_table(config: LoopedConfig) -> Tensor:
    """Return the cosine and the sine of every position's angles, float32, of the shape above.

    Example:
        >>> rotary_table(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32)).shape
        torch.Size([1, 8, 1, 4, 2])
    """
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    angles = torch.outer(torch.arange(config.max_positions).float(), 1.0 / config.rope_theta**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]


def is_rotary_table(stored: Tensor, config: LoopedConfig) -> bool:
    """Return whether a stored tensor is the config's table; loosely, since it may be in half precision.

    Example:
        >>> config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32)
        >>> is_rotary_table(rotary_table(config).bfloat16(), config), is_rotary_table(torch.ones(2), config)
        (True, False)
    """
    if stored.shape != rotary_table_shape(config):
        return False
    return torch.allclose(stored.float(), rotary_table(config), atol=0.01)
