"""Terms that are added to the training loss to make a loop stable.

Takes callables and states; knows no model, no loss and no training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from looplm.stability.products import PRODUCTS, ProductName
from looplm.stability.vectors import Hidden, StepFn, mask_padding, random_unit, squared_norm

__all__ = ["JacobianPenalty", "LastStepPenalty", "Penalty"]


class Penalty(ABC):
    """A term of the loss at the end of a trajectory."""

    fraction: float = 1.0
    """Share of the sequences on which the term is computed."""

    @abstractmethod
    def __call__(
        self,
        step_fn: StepFn,
        hidden: Hidden,
        previous: Hidden,
        mask: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the term, a scalar.

        Args:
            step_fn: Φ at fixed context.
            hidden: The final state h_t, ``(B, …)``.
            previous: The state before it, h_{t−1}.
            mask: ``(B, T)``, non-zero at real positions, or None.
            generator: The source of all randomness.
        """


class JacobianPenalty(Penalty):
    """Jacobian Spectral Radius Regularization (JSRR): ``mean_i ‖J⁽ⁱ⁾v⁽ⁱ⁾‖²``, v⁽ⁱ⁾ a random unit vector.

    The paper's regulariser, with one vector a sequence. J is the Jacobian of Φ at the final state, which is detached:
    no gradient enters the trajectory. Input and output are restricted to real positions. In expectation over v the term
    is ``‖J‖_F² / n`` with n = real positions × width: a mean-square gain, which the paper uses as a cheap stand-in for
    the spectral radius.

    Args:
        method: The product, ``finite_difference`` (default) or ``jvp`` (exact).
        fraction: Share of the sequences, drawn at random each step, on which the term is computed: an unbiased
            estimate at a fraction of the cost.

    Raises:
        ValueError: If ``method`` is unknown or ``fraction`` is outside (0, 1].

    Example:
        >>> penalty = JacobianPenalty(method="jvp")
        >>> h = torch.zeros(3, 5)
        >>> round(penalty(lambda x: 0.5 * x, h, h, None, torch.Generator()).item(), 4)
        0.25
    """

    def __init__(self, method: ProductName = "finite_difference", fraction: float = 1.0) -> None:
        if method not in PRODUCTS:
            raise ValueError(f"`method` must be one of {get_args(ProductName)}, got {method!r}.")
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be in (0, 1], got {fraction}.")
        self.method = method
        self.fraction = fraction

    def __call__(
        self,
        step_fn: StepFn,
        hidden: Hidden,
        previous: Hidden,
        mask: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Return ``mean_i ‖J⁽ⁱ⁾v⁽ⁱ⁾‖²``, a scalar; see :meth:`Penalty.__call__`."""
        hidden = pytree.tree_map(lambda x: x.detach(), hidden)
        vector = random_unit(hidden, mask, generator)
        product = PRODUCTS[self.method](step_fn, hidden, vector)
        return squared_norm(mask_padding(product, mask)).mean()


class LastStepPenalty(Penalty):
    """The paper's ablation: ``mean ‖h_t − h_{t−1}‖₂`` over real positions, with gradient into the trajectory.

    Example:
        >>> h = torch.zeros(3, 5, 4)
        >>> LastStepPenalty()(lambda x: x, h + 1.0, h, None, torch.Generator()).item()
        2.0
    """

    def __call__(
        self,
        step_fn: StepFn,
        hidden: Hidden,
        previous: Hidden,
        mask: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the mean norm of the last step over real positions, a scalar; see :meth:`Penalty.__call__`."""
        lengths, count = torch.zeros(()), torch.zeros(())
        for step in pytree.tree_leaves(pytree.tree_map(torch.sub, hidden, previous)):
            # The norm has no gradient at zero: a state that has converged exactly contributes none.
            squared = step.square().sum(-1)
            moved = squared > 0
            length = torch.where(moved, squared, 1.0).sqrt() * moved
            real: Any = mask_padding(torch.ones_like(length)[..., None], mask)
            lengths, count = (length[..., None] * real).sum() + lengths, real.sum() + count
        return lengths / count.clamp_min(1.0)
