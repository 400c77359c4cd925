"""Which product a training run can differentiate: a table of what was measured, by parallelism and type of weights.

Knows names alone; how a trainer maps to them is :mod:`looplm.parallel`'s affair. Measured with torch 2.13 on two
processes; "no" is a crash, an error or a wrong gradient, not a matter of taste:

- finite differences evaluate Φ in float32, which bfloat16 weights refuse, and lose digits where products are narrowed;
- forward mode and double backward cannot go through parameters that ZeRO stage 3 gathers module by module;
- forward mode crashes in FSDP 1, whose flat parameters are views.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from looplm.stability.products import ProductName

__all__ = ["Parallelism", "possible_products"]

Parallelism: TypeAlias = Literal["single", "ddp", "fsdp2", "fsdp1", "deepspeed", "deepspeed_stage_3"]
"""How parameters are held: whole (``single``, ``ddp``), in shards of torch's FSDP 2 or 1, or of DeepSpeed's ZeRO."""

# Best first: the cheapest, then the exact one.
_ALL: tuple[ProductName, ...] = ("finite_difference", "jvp", "vjp")
_POSSIBLE: dict[Parallelism, tuple[ProductName, ...]] = {
    "single": _ALL,
    "ddp": _ALL,
    "fsdp2": _ALL,
    "fsdp1": ("finite_difference", "vjp"),
    "deepspeed": _ALL,
    "deepspeed_stage_3": ("finite_difference",),
}


def possible_products(
    parallelism: Parallelism, *, narrow_weights: bool, narrowed: bool = False
) -> tuple[ProductName, ...]:
    """Return the products that are right in a run, the one to use first; none where nothing works.

    Args:
        parallelism: How parameters are held.
        narrow_weights: Whether the weights themselves are bfloat16 or float16 (not: computed in it under autocast).
        narrowed: Whether float32 matrix products are, see :func:`~looplm.stability.products.narrowed_products`; finite
            differences then come last.

    Example:
        >>> possible_products("fsdp1", narrow_weights=True)
        ('vjp',)
    """
    possible = tuple(name for name in _POSSIBLE[parallelism] if not (narrow_weights and name == "finite_difference"))
    return tuple(sorted(possible, key=lambda name: name == "finite_difference")) if narrowed else possible
