"""Latent states as vectors: one vector per sequence, padding left out.

A state is a tensor ``(B, …)`` or a dict of them; all of a sample's entries at real positions, concatenated, are its
vector. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "Hidden",
    "StepFn",
    "batch_unit",
    "flatten",
    "mask_padding",
    "num_real",
    "per_sequence_dot",
    "random_unit",
    "scale",
    "squared_norm",
    "unflatten",
]

Hidden: TypeAlias = Tensor | dict[str, Tensor]
StepFn: TypeAlias = Callable[[Any], Any]
"""Maps a state to the next one, structure and shapes kept."""


def flatten(hidden: Hidden) -> Tensor:
    """Return all entries of each sample, ``(B, N)``: the parts of a dict one after the other, by name.

    Example:
        >>> flatten({"b": torch.zeros(2, 1), "a": torch.ones(2, 1, 2)}).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    """
    parts = [hidden[name] for name in sorted(hidden)] if isinstance(hidden, dict) else [hidden]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def unflatten(flat: Tensor, like: Hidden) -> Hidden:
    """Undo :func:`flatten`: return ``flat`` ``(B, N)`` in the structure, shapes and types of ``like``.

    Example:
        >>> unflatten(torch.tensor([[1.0, 2.0]]), {"a": torch.zeros(1, 1), "b": torch.zeros(1, 1)})
        {'a': tensor([[1.]]), 'b': tensor([[2.]])}
    """
    if not isinstance(like, dict):
        return flat.reshape(like.shape).to(like.dtype)
    names = sorted(like)
    parts = flat.split([like[name][0].numel() for name in names], dim=1)
    return {name: part.reshape(like[name].shape).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}


def _map(function: Callable[..., Tensor], *hidden: Hidden) -> Hidden:
    mapped: Hidden = pytree.tree_map(function, *hidden)
    return mapped


def mask_padding(hidden: Hidden, mask: Tensor | None) -> Hidden:
    """Set padded positions to zero.

    Args:
        hidden: Tensors ``(B, T, …)``, or dict of them.
        mask: ``(B, T)``, non-zero at real positions; None: all are real. A tensor of another second dimension
            (a part of the state without positions) is kept whole.

    Example:
        >>> mask_padding(torch.ones(1, 2, 2), torch.tensor([[1, 0]])).tolist()
        [[[1.0, 1.0], [0.0, 0.0]]]
    """
    if mask is None:
        return hidden

    def restrict(x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[1] != mask.shape[1]:
            return x
        return x * (mask != 0).to(x.dtype).reshape(*mask.shape, *([1] * (x.ndim - 2)))

    return _map(restrict, hidden)


def per_sequence_dot(a: Hidden, b: Hidden) -> Tensor:
    """Return ``⟨a, b⟩`` of each sequence, shape ``(B,)``, accumulated in at least float32.

    Example:
        >>> per_sequence_dot(torch.ones(2, 3), torch.full((2, 3), 2.0)).tolist()
        [6.0, 6.0]
    """

    def dot(x: Tensor, y: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (x.to(dtype) * y.to(dtype)).flatten(1).sum(1)

    total: Tensor = sum(pytree.tree_leaves(_map(dot, a, b)))
    return total


def squared_norm(hidden: Hidden) -> Tensor:
    """Return ``‖h‖²`` of each sequence, shape ``(B,)``.

    Example:
        >>> squared_norm(torch.tensor([[3.0, 4.0]])).tolist()
        [25.0]
    """
    return per_sequence_dot(hidden, hidden)


def scale(hidden: Hidden, factor: Tensor) -> Hidden:
    """Multiply the vector of each sequence by its ``factor``, shape ``(B,)``.

    Example:
        >>> scale(torch.ones(2, 2), torch.tensor([1.0, 3.0])).tolist()
        [[1.0, 1.0], [3.0, 3.0]]
    """
    return _map(lambda x: x * factor.to(x.dtype).reshape(-1, *([1] * (x.ndim - 1))), hidden)


def num_real(hidden: Hidden, mask: Tensor | None) -> Tensor:
    """Return n, the dimension of each sequence's vector (real positions × width), shape ``(B,)``.

    Example:
        >>> num_real(torch.zeros(1, 3, 4), torch.tensor([[1, 1, 0]])).tolist()
        [8.0]
    """
    return squared_norm(mask_padding(_map(torch.ones_like, hidden), mask))


def _normal(hidden: Hidden, generator: torch.Generator) -> Hidden:
    def draw(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.randn(x.shape, generator=generator, device=generator.device, dtype=dtype).to(x.device)

    return _map(draw, hidden)


def random_unit(hidden: Hidden, mask: Tensor | None, generator: torch.Generator) -> Hidden:
    """Draw for each sequence a vector v, uniform on the unit sphere of its real positions.

    Args:
        hidden: Gives structure, shapes, dtype and device.
        mask: ``(B, T)`` or None, see :func:`mask_padding`.
        generator: The source of the draw; its device decides where it is drawn.

    Example:
        >>> v = random_unit(torch.zeros(2, 3, 4), None, torch.Generator())
        >>> squared_norm(v).allclose(torch.ones(2))
        True
    """
    vector = mask_padding(_normal(hidden, generator), mask)
    unit = scale(vector, squared_norm(vector).clamp_min(torch.finfo(torch.float32).tiny).rsqrt())
    return _map(lambda v, x: v.to(x.dtype), unit, hidden)


def batch_unit(hidden: Hidden, generator: torch.Generator) -> Hidden:
    """Draw one vector for the whole batch, uniform on the unit sphere of batch × tokens × width; arguments as above.

    Example:
        >>> v = batch_unit(torch.zeros(2, 3, 4), torch.Generator())
        >>> v.norm().allclose(torch.ones(()))
        True
    """
    vector = _normal(hidden, generator)
    norm = squared_norm(vector).sum().sqrt()
    return _map(lambda v, x: (v / norm).to(x.dtype), vector, hidden)
