"""Estimates of how much a step stretches perturbations, each under its true name, one value a sequence.

Takes a step and a state, knows no model. All arguments and shapes are those of
:mod:`looplm.stability.products`; ``mask`` ``(B, T)`` restricts vectors and products to real positions.

=================== =========================================== ==========================================
quantity            definition                                  estimate
=================== =========================================== ==========================================
``mean_gain``       ``E‖Jv‖² = ‖J‖_F² / n``, v on the sphere     mean over draws of v, with standard error
``spectral_norm``   ``‖J‖₂``, the largest singular value         power iteration on ``JᵀJ``
``spectral_radius`` ``ρ(J)``, the largest ``|λ|``                growth of ``Jᵏv`` (Gelfand)
=================== =========================================== ==========================================

For every J: ``ρ ≤ ‖J‖₂`` and ``mean_gain ≤ ‖J‖₂²``; neither ρ nor the mean gain bounds the other.

The last two follow a sequence ``v, Av, A²v, …`` whose growth tends to what is asked, slowly: like 1/k where the leading
eigenvalue is defective, with oscillations where it is a complex pair. The last vectors of that sequence hold more than
their lengths do. On the space that they span, A is a small matrix whose leading eigenvalue is much closer to the limit;
it costs no further product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from looplm.stability.products import ProductName, product_named, vjp
from looplm.stability.vectors import Hidden, StepFn, flatten, mask_padding, random_unit, scale, squared_norm

__all__ = ["Estimate", "growth", "mean_gain", "spectral_norm", "spectral_radius"]

_MIN_SPAN, _MAX_SPAN = 4, 10  # vectors of a power iteration on whose span the step is looked at


@dataclass(frozen=True)
class Estimate:
    """A value for each sequence and how far off it may be.

    Attributes:
        value: ``(B,)``.
        standard_error: ``(B,)``: of a mean over independent draws.

    Example:
        >>> Estimate(value=torch.tensor([0.25]), standard_error=torch.tensor([0.01])).value.item()
        0.25
    """

    value: Tensor
    standard_error: Tensor


def growth(vector: Hidden, mask: Tensor | None) -> tuple[Tensor, Hidden]:
    """Return ``‖v‖`` over real positions ``(B,)`` and ``v / ‖v‖``; a zero vector stays zero.

    Example:
        >>> norm, unit = growth(torch.tensor([[3.0, 4.0]]), None)
        >>> norm.item(), unit.norm().item()
        (5.0, 1.0)
    """
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
    product = product_named(method)
    draws = []
    for _ in range(num_samples):
        vector = random_unit(hidden, mask, generator)
        draws.append(squared_norm(mask_padding(product(step_fn, hidden, vector), mask)))
    gains = torch.stack(draws)
    return Estimate(gains.mean(0), gains.std(0) / num_samples**0.5)


def _radius_on_span(vectors: list[Hidden], norms: list[Tensor]) -> Tensor:
    """Return the spectral radius of A on the span of consecutive vectors of a power iteration.

    Args:
        vectors: m + 1 unit vectors with ``A v_i = n_i v_{i+1}``.
        norms: The m lengths n, each ``(B,)``.

    Returns:
        float64 ``(B,)`` on the CPU: largest ``|eigenvalue|`` of ``Qᵀ A Q``, with Q an orthonormal basis of the first m
        vectors (dynamic mode decomposition, Schmid 2010); NaN where a vector is not finite.
    """
    flat = torch.stack([flatten(v) for v in vectors], dim=-1).cpu()
    # Below this share of the largest, a singular value of the basis is the products' rounding error.
    cutoff = torch.finfo(flat.dtype).eps ** 0.5
    flat = flat.double()
    before, after = flat[..., :-1], flat[..., 1:] * torch.stack(norms, dim=-1).cpu().double()[:, None, :]
    finite = (before.isfinite() & after.isfinite()).all((1, 2))
    before, after = (torch.where(finite[:, None, None], x, 0.0) for x in (before, after))
    basis, sizes, mixing = torch.linalg.svd(before, full_matrices=False)
    kept = sizes > cutoff * sizes[:, :1]
    inverse = torch.where(kept, 1 / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 0.0)
    small = kept[:, :, None] * (basis.mT @ after @ mixing.mT) * inverse[:, None, :]
    return torch.where(finite, torch.linalg.eigvals(small).abs().amax(1), torch.nan)


def _follow(
    apply: Callable[[Hidden], Hidden], vector: Hidden, num_products: int, burn_in: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Hidden]:
    """Follow ``Aᵏv``; return the limit of its growth ``(B,)``, the last growth factor ``(B,)`` and the last vector.

    The factor and the vector carry the gradient of the last application, the limit carries none.
    """
    norms: list[Tensor] = []
    vectors = [vector]
    with torch.no_grad():
        for _ in range(num_products - 1):
            norm, vector = growth(apply(vector), mask)
            norms.append(norm)
            vectors = [*vectors[-_MAX_SPAN:], vector]
    last, vector = growth(apply(vector), mask)
    norms.append(last.detach())
    limit = torch.stack(norms[burn_in:]).log().mean(0).exp()
    span = min(_MAX_SPAN, num_products - burn_in)
    if span >= _MIN_SPAN:
        vectors = [*vectors, pytree.tree_map(lambda x: x.detach(), vector)][-span - 1 :]
        limit = _radius_on_span(vectors, norms[-span:]).to(limit)
    return limit, last, vector


def _with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """Return ``value`` with the gradient ``value · ∇ log(source)``."""
    if not source.requires_grad:
        return value
    return value * source / source.detach().clamp_min(torch.finfo(source.dtype).tiny)


def spectral_norm(
    step_fn: StepFn,
    hidden: Hidden,
    *,
    generator: torch.Generator,
    mask: Tensor | None = None,
    num_iterations: int = 20,
    method: ProductName = "finite_difference",
) -> Tensor:
    """Estimate ``‖J‖₂`` by power iteration on ``JᵀJ``, from below.

    Args:
        step_fn: Φ at fixed context.
        hidden: The state, ``(B, …)``.
        generator: The source of the start vector.
        mask: ``(B, T)`` or None.
        num_iterations: Number of applications of ``JᵀJ`` before the last product, at least 1.
        method: The product for ``Jv``, not ``vjp``; ``Jᵀu`` is always by reverse mode.

    Returns:
        ``(B,)``; its gradient, if recorded, is that of ``log ‖Jv‖`` of the last product alone, times the value.

    Raises:
        ValueError: If ``num_iterations`` is below 1 or ``method`` is ``vjp``.
        RuntimeError: Inside ``torch.inference_mode``, where there is no reverse mode.

    Example:
        >>> stretch = torch.diag(torch.tensor([3.0, 1.0, 0.5]))
        >>> norm = spectral_norm(lambda h: h @ stretch, torch.ones(1, 3), generator=torch.Generator())
        >>> round(norm.item(), 3)
        3.0
    """
    if num_iterations < 1:
        raise ValueError(f"`num_iterations` must be >= 1, got {num_iterations}.")
    if method == "vjp":
        raise ValueError("`spectral_norm` needs `J v`, got `vjp`: use `finite_difference` or `jvp`.")
    product = product_named(method)

    def gram(vector: Hidden) -> Hidden:
        return vjp(step_fn, hidden, mask_padding(product(step_fn, hidden, vector), mask))

    # Every vector of a symmetric matrix's iteration is of use on their span.
    burn_in = max(0, num_iterations - _MAX_SPAN)
    with torch.no_grad():
        limit, _, vector = _follow(gram, random_unit(hidden, mask, generator), num_iterations, burn_in, mask)
    last = growth(product(step_fn, hidden, vector), mask)[0]
    # Both are from below, but a mean of few growth factors is behind the last one.
    return _with_gradient_of(torch.maximum(last.detach(), limit.sqrt()), last)


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
    """Estimate ``ρ(J)`` by the growth of ``Jᵏv`` after a burn-in.

    By Gelfand, ``ρ = lim ‖Jᵏv‖^{1/k}`` for almost every v. The growth factor of a single product does not converge
    where the leading eigenvalues are a complex pair; the geometric mean does: within ``O(1/(num_products − burn_in))``
    for pairs, ``O(1/num_products)`` for defective leading eigenvalues. The burn-in leaves out the transient growth of a
    non-normal J. With 4 products or more after the burn-in, the eigenvalue on the span of the last of them (at most 10)
    takes the mean's place, which removes most of these errors.

    Args:
        step_fn: Φ at fixed context.
        hidden: The state, ``(B, …)``.
        generator: The source of the start vector.
        mask: ``(B, T)`` or None.
        num_products: Number of products in all.
        burn_in: Number of products left out; None: four fifths, or fewer so that 10 are left, but at least half.
        method: The product; with ``vjp`` the growth of ``(Jᵀ)ᵏv``, which has the same limit.

    Returns:
        ``(B,)``; its gradient, if recorded, is that of ``log ‖Jv‖`` of the last product alone, times the value.

    Raises:
        ValueError: If not ``0 <= burn_in < num_products``.

    Example:
        >>> turn = torch.tensor([[0.0, -0.5], [0.5, 0.0]])  # eigenvalues ±0.5i
        >>> rho = spectral_radius(lambda h: h @ turn.T, torch.ones(1, 2), generator=torch.Generator())
        >>> round(rho.item(), 3)
        0.5
    """
    if burn_in is None:
        burn_in = min(num_products * 4 // 5, max(num_products // 2, num_products - _MAX_SPAN))
    if not 0 <= burn_in < num_products:
        raise ValueError(f"`burn_in` must be in [0, `num_products`), got {burn_in} of {num_products}.")
    product = product_named(method)
    start = random_unit(hidden, mask, generator)
    limit, last, _ = _follow(lambda vector: product(step_fn, hidden, vector), start, num_products, burn_in, mask)
    return _with_gradient_of(limit, last)
