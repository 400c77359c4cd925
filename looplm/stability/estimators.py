"""Estimates of how much a step stretches perturbations, each under its true name, one value a sequence.

Takes a step and a state, knows no model. All arguments and shapes are those of
:mod:`looplm.stability.products`; ``mask`` ``(B, T)`` restricts vectors and products to real positions.

=================== =========================================== ==========================================
quantity            definition                                  estimate
=================== =========================================== ==========================================
``mean_gain``       ``E‖Jv‖² = ‖J‖_F² / n``, v on the sphere     mean over draws of v, with standard error
``spectral_norm``   ``‖J‖₂``, the largest singular value         power iteration on ``JᵀJ``
``spectral_radius`` ``ρ(J)``, the largest ``|λ|``                geometric mean of the growth of ``Jᵏv``
=================== =========================================== ==========================================

For every J: ``ρ ≤ ‖J‖₂`` and ``mean_gain ≤ ‖J‖₂²``; neither ρ nor the mean gain bounds the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.stability.products import PRODUCTS, ProductName, vjp
from looplm.stability.vectors import Hidden, StepFn, mask_padding, random_unit, scale, squared_norm

__all__ = ["Estimate", "growth", "mean_gain", "spectral_norm", "spectral_radius"]


@dataclass(frozen=True)
class Estimate:
    """A value for each sequence and how far off it may be.

    Attributes:
        value: ``(B,)``.
        standard_error: ``(B,)``: of a mean over independent draws.
    """

    value: Tensor
    standard_error: Tensor


def growth(vector: Hidden, mask: Tensor | None) -> tuple[Tensor, Hidden]:
    """Return ``‖v‖`` over real positions ``(B,)`` and ``v / ‖v‖``; a zero vector stays zero."""
    vector = mask_padding(vector, mask)
    norm = squared_norm(vector).sqrt()
    tiny = torch.finfo(norm.dtype).tiny
    return norm, scale(vector, torch.where(norm > tiny, 1 / norm.clamp_min(tiny), 0.0))


def mean_gain(
    step_fn: StepFn,
    hidden: Hidden,
    *,
    generator: torch.Generator,
    mask: Tensor | None = None,
    num_samples: int = 8,
    method: ProductName = "finite_difference",
) -> Estimate:
    """Estimate ``E‖Jv‖² = ‖J‖_F² / n`` for v uniform on the unit sphere (Hutchinson), n = real positions × width.

    Args:
        step_fn: Φ at fixed context.
        hidden: The state, ``(B, …)``.
        generator: The source of v.
        mask: ``(B, T)`` or None.
        num_samples: Number of draws, at least 2.
        method: The product.

    Returns:
        The mean over draws and its standard error, each ``(B,)``.

    Raises:
        ValueError: If ``num_samples`` is below 2.

    Example:
        >>> estimate = mean_gain(lambda h: 0.5 * h, torch.ones(3, 4), generator=torch.Generator())
        >>> [round(value, 3) for value in estimate.value.tolist()]
        [0.25, 0.25, 0.25]
    """
    if num_samples < 2:
        raise ValueError(f"`num_samples` must be >= 2, got {num_samples}.")
    product = PRODUCTS[method]
    draws = []
    for _ in range(num_samples):
        vector = random_unit(hidden, mask, generator)
        draws.append(squared_norm(mask_padding(product(step_fn, hidden, vector), mask)))
    gains = torch.stack(draws)
    return Estimate(gains.mean(0), gains.std(0) / num_samples**0.5)


def spectral_norm(
    step_fn: StepFn,
    hidden: Hidden,
    *,
    generator: torch.Generator,
    mask: Tensor | None = None,
    num_iterations: int = 20,
    method: ProductName = "finite_difference",
) -> Tensor:
    """Estimate ``‖J‖₂`` by power iteration on ``JᵀJ``: ``v ← JᵀJv / ‖JᵀJv‖``, then ``‖Jv‖``; from below.

    Args:
        step_fn: Φ at fixed context.
        hidden: The state, ``(B, …)``.
        generator: The source of the start vector.
        mask: ``(B, T)`` or None.
        num_iterations: Number of applications of ``JᵀJ`` before the last product, at least 1.
        method: The product for ``Jv``; ``Jᵀu`` is always by reverse mode.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: If ``num_iterations`` is below 1.
    """
    if num_iterations < 1:
        raise ValueError(f"`num_iterations` must be >= 1, got {num_iterations}.")
    product = PRODUCTS[method]
    vector = random_unit(hidden, mask, generator)
    with torch.no_grad():
        for _ in range(num_iterations):
            image = mask_padding(product(step_fn, hidden, vector), mask)
            vector = growth(vjp(step_fn, hidden, image), mask)[1]
    return growth(product(step_fn, hidden, vector), mask)[0]


def spectral_radius(
    step_fn: StepFn,
    hidden: Hidden,
    *,
    generator: torch.Generator,
    mask: Tensor | None = None,
    num_products: int = 50,
    burn_in: int | None = None,
    method: ProductName = "finite_difference",
) -> Tensor:
    """Estimate ``ρ(J)`` as the geometric mean of the growth factors of ``Jᵏv`` after a burn-in.

    By Gelfand, ``ρ = lim ‖Jᵏv‖^{1/k}`` for almost every v. The factor of a single step does not converge where the
    leading eigenvalues are a complex pair, the geometric mean does: within ``O(1/(num_products − burn_in))`` for
    pairs, ``O(1/num_products)`` for defective leading eigenvalues. The burn-in leaves out the transient growth of a
    non-normal J.

    Args:
        step_fn: Φ at fixed context.
        hidden: The state, ``(B, …)``.
        generator: The source of the start vector.
        mask: ``(B, T)`` or None.
        num_products: Number of products in all.
        burn_in: Number of products left out of the mean; None: four fifths.
        method: The product. The gradient, if recorded, is ``ρ · ∇ log‖Jv_k‖`` of the last product.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: If not ``0 <= burn_in < num_products``.

    Example:
        >>> turn = torch.tensor([[0.0, -0.5], [0.5, 0.0]])  # eigenvalues ±0.5i
        >>> rho = spectral_radius(lambda h: h @ turn.T, torch.ones(1, 2), generator=torch.Generator())
        >>> round(rho.item(), 3)
        0.5
    """
    burn_in = num_products * 4 // 5 if burn_in is None else burn_in
    if not 0 <= burn_in < num_products:
        raise ValueError(f"`burn_in` must be in [0, `num_products`), got {burn_in} of {num_products}.")
    product = PRODUCTS[method]
    vector = random_unit(hidden, mask, generator)
    logs = []
    with torch.no_grad():
        for index in range(num_products - 1):
            norm, vector = growth(product(step_fn, hidden, vector), mask)
            if index >= burn_in:
                logs.append(norm.log())
    norm, _ = growth(product(step_fn, hidden, vector), mask)
    logs.append(norm.detach().log())
    # The value is the geometric mean; its gradient is that of the last product, not a share of it.
    return torch.stack(logs).mean(0).exp() * (norm / norm.detach())
