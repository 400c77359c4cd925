"""Eigenvalues of a step's Jacobian: exact for small states, leading ones for large. Takes callables, knows no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor
from torch.utils import _pytree as pytree

from looplm.stability.products import ProductName, product_named
from looplm.stability.vectors import Hidden, StepFn, flatten, mask_padding, unflatten

__all__ = ["dense_jacobian", "exact_spectrum", "leading_eigenvalues", "require_scipy"]

_SCIPY = RequirementCache("scipy>=1.13")


def require_scipy(what: str) -> None:
    """Raise if SciPy is missing.

    Raises:
        ModuleNotFoundError: Says what needs it and how to install it.

    Example:
        >>> require_scipy("leading_eigenvalues")
    """
    if not _SCIPY:
        raise ModuleNotFoundError(f"`{what}` needs SciPy: pip install 'looplm[analysis]'. {_SCIPY}")


class _NotFiniteError(ArithmeticError):
    """A product is not finite: this sequence has no eigenvalues."""


def _real_coordinates(hidden: Hidden, mask: Tensor | None) -> Tensor:
    """Return which coordinates of the flattened state are real, bool ``(B, N)``."""
    return flatten(mask_padding(pytree.tree_map(torch.ones_like, hidden), mask)) > 0


@torch.no_grad()
def dense_jacobian(step_fn: StepFn, hidden: Hidden, *, method: ProductName = "jvp") -> Tensor:
    """Return the Jacobian of each sequence, ``(B, N, N)``, vector by vector: N products for the whole batch.

    Args:
        step_fn: Φ at fixed context; sequences must not interact in it.
        hidden: The state, ``(B, …)``, N entries a sample.
        method: The product.

    Example:
        >>> dense_jacobian(lambda h: 0.5 * h, torch.ones(1, 2)).tolist()
        [[[0.5, 0.0], [0.0, 0.5]]]
    """
    size = flatten(hidden).shape[1]
    columns = []
    for index in range(size):
        basis = torch.zeros_like(flatten(hidden))
        basis[:, index] = 1.0
        columns.append(flatten(product_named(method)(step_fn, hidden, unflatten(basis, hidden))))
    return torch.stack(columns, dim=1 if method == "vjp" else 2)  # Jᵀ times a basis vector is a row of J


def exact_spectrum(
    step_fn: StepFn,
    hidden: Hidden,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    method: ProductName = "jvp",
) -> list[Tensor]:
    """Return all eigenvalues of the Jacobian of each sequence, by N products and dense algebra.

    Args:
        step_fn: Φ at fixed context.
        hidden: The state, ``(B, …)``; for ``causal`` a tensor ``(B, T, D)``.
        mask: ``(B, T)`` or None; eigenvalues are those of the block of real positions.
        causal: Whether position i of Φ's output depends on positions ≤ i alone. Then J is block-lower-triangular and
            its eigenvalues are those of its T diagonal blocks ``∂Φ(h)_i/∂h_i`` (D × D), which are better conditioned.
        method: The product.

    Returns:
        For each sequence complex eigenvalues ``(n,)``, n = real positions × width, largest modulus first.

    Raises:
        ValueError: If ``causal`` and the state is not one tensor ``(B, T, D)``.

    Example:
        >>> turn = torch.tensor([[0.0, -0.5], [0.5, 0.0]])
        >>> (eigenvalues,) = exact_spectrum(lambda h: h @ turn.T, torch.ones(1, 2))
        >>> sorted(round(value.imag, 3) for value in eigenvalues.tolist())
        [-0.5, 0.5]
    """
    jacobian = dense_jacobian(step_fn, hidden, method=method)
    real = _real_coordinates(hidden, mask)
    spectra = []
    for matrix, kept in zip(jacobian, real, strict=True):
        if causal:
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                raise ValueError("`causal` needs a state that is one tensor (B, T, D).")
            length, width = hidden.shape[1:]
            blocks = matrix.reshape(length, width, length, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            values = torch.linalg.eigvals(blocks[kept.reshape(length, width)[:, 0]]).flatten()
        else:
            values = torch.linalg.eigvals(matrix[kept][:, kept])
        spectra.append(values[values.abs().argsort(descending=True)])
    return spectra


@torch.no_grad()
def leading_eigenvalues(
    step_fn: StepFn,
    hidden: Hidden,
    k: int = 6,
    *,
    mask: Tensor | None = None,
    method: ProductName = "jvp",
    tolerance: float = 1e-8,
    seed: int = 0,
) -> Tensor:
    """Return the k eigenvalues of largest modulus of each sequence's Jacobian, by Arnoldi iteration without a matrix.

    Uses SciPy's ``eigs`` (ARPACK), one sequence after the other; falls back to dense algebra where n ≤ k + 2.

    Args:
        step_fn: Φ at fixed context.
        hidden: The state, ``(B, …)``.
        k: How many.
        mask: ``(B, T)`` or None.
        method: The product.
        tolerance: Relative accuracy of the eigenvalues.
        seed: Seed of the start vector.

    Returns:
        complex128 ``(B, k)``, largest modulus first; NaN where a sequence has fewer, fewer have converged, or its
        Jacobian is not finite.

    Raises:
        ModuleNotFoundError: If SciPy is not installed.
        ValueError: If ``k`` is below 1.

    Example:
        >>> stretch = torch.diag(torch.tensor([0.9, 0.5, 0.2, 0.1]))
        >>> (leading,) = leading_eigenvalues(lambda h: h @ stretch, torch.ones(1, 4), k=2)
        >>> [round(abs(value), 3) for value in leading.tolist()]
        [0.9, 0.5]
    """
    require_scipy("leading_eigenvalues")
    if k < 1:
        raise ValueError(f"`k` must be >= 1, got {k}.")
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs

    flat, real = flatten(hidden), _real_coordinates(hidden, mask)
    found = torch.full((len(flat), k), complex("nan"), dtype=torch.complex128)
    for row, kept in enumerate(real):
        size = int(kept.sum())

        def matvec(vector: np.ndarray, row: int = row, kept: Tensor = kept) -> Any:
            # The other sequences ride along with a zero vector: a step takes whole batches.
            tangent = torch.zeros_like(flat)
            tangent[row, kept] = torch.as_tensor(np.asarray(vector).reshape(-1), dtype=flat.dtype, device=flat.device)
            image = flatten(product_named(method)(step_fn, hidden, unflatten(tangent, hidden)))
            if not bool(image[row].isfinite().all()):
                raise _NotFiniteError
            return image[row, kept].double().cpu().numpy()

        operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)
        start = np.random.default_rng(seed).standard_normal(size)
        num_vectors = min(size, max(4 * k, 40))
        try:
            if size <= k + 2:
                values = np.linalg.eigvals(np.stack([matvec(basis) for basis in np.eye(size)], axis=1))
            elif not matvec(start).any():
                values = np.zeros(k)  # ARPACK cannot start on a map to zero
            else:
                values = eigs(operator, k=k, v0=start, tol=tolerance, ncv=num_vectors, return_eigenvectors=False)
        except ArpackNoConvergence as error:
            values = error.eigenvalues
        except _NotFiniteError:
            continue
        values = values[np.argsort(-np.abs(values))][:k]
        found[row, : len(values)] = torch.from_numpy(np.asarray(values, dtype=np.complex128))
    return found
