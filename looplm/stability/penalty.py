"""Terms that are added to the training loss to make a loop stable.

Takes callables and states; knows no model, no loss and no training.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from looplm.stability.estimators import spectral_norm, spectral_radius
from looplm.stability.products import PRODUCTS, ProductName, narrowed_products, vjp
from looplm.stability.vectors import Hidden, StepFn, batch_unit, mask_padding, random_unit, squared_norm

__all__ = ["JacobianPenalty", "LastStepPenalty", "Penalty", "Quantity", "StarsReleasePenalty"]

Quantity: TypeAlias = Literal["mean_gain", "spectral_radius", "spectral_norm"]


class Penalty(ABC):
    """A term of the loss at the end of a trajectory.

    Example:
        >>> class StepSize(Penalty):
        ...     def __call__(self, step_fn, hidden, previous, mask, generator):
        ...         return (step_fn(hidden) - hidden).pow(2).mean()
        >>> StepSize()(lambda h: 0.5 * h, torch.ones(1, 2), torch.ones(1, 2), None, torch.Generator()).item()
        0.25
    """

    fraction: float = 1.0
    """Share of the sequences on which the term is computed."""
    method: ProductName | Literal["auto"] | None = None
    """The product that it differentiates, if it uses one."""

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
    """``mean_i max(q_i − target, 0)``, q_i a measure of the Jacobian of Φ at the final state of sequence i.

    The state is detached: no gradient enters the trajectory. Input and output are restricted to real positions. With
    the defaults this is the paper's Jacobian Spectral Radius Regularization (JSRR), with one random vector a sequence:
    ``mean_i ‖J⁽ⁱ⁾v⁽ⁱ⁾‖²``. In expectation over v that is ``‖J‖_F² / n`` with n = real positions × width, a mean-square
    gain, which the paper uses as a cheap stand-in for the spectral radius.

    =================== ==================================================== ========================
    quantity            q_i                                                  products
    =================== ==================================================== ========================
    ``mean_gain``       ``‖Jv‖²``, v random                                  1
    ``spectral_radius`` geometric mean of the growth of ``Jᵏv``, late k      ``num_iterations``
    ``spectral_norm``   ``‖Jv‖`` after power iteration on ``JᵀJ``            ``2·num_iterations + 1``
    =================== ==================================================== ========================

    Only the last product has a gradient; for ``spectral_radius`` it is ``ρ · ∇ log‖Jv_k‖``, v_k being what the start-up
    products made of v.

    Args:
        quantity: What is penalised.
        method: The product: ``finite_difference`` (any kernel), ``jvp`` (exact), ``vjp``, or ``auto``: what the run's
            strategy and precision allow (``LoopLM`` decides and says so); outside of it finite differences, or ``jvp``
            where the state is narrower than float32 without autocast, or float32 products are.
        num_iterations: Products (``spectral_radius``, at least 2) or applications of ``JᵀJ`` (``spectral_norm``); 1 for
            ``mean_gain``.
        target: No penalty below it; a target < 1 for the spectral radius asks for stability and no more.
        fraction: Share of the sequences, drawn at random each step, on which the term is computed: an unbiased
            estimate at a fraction of the cost.

    Raises:
        ValueError: If a value is outside its range or has no effect.

    Example:
        >>> penalty = JacobianPenalty(method="jvp")
        >>> h = torch.zeros(3, 5)
        >>> round(penalty(lambda x: 0.5 * x, h, h, None, torch.Generator()).item(), 4)
        0.25
    """

    def __init__(
        self,
        quantity: Quantity = "mean_gain",
        method: ProductName | Literal["auto"] = "auto",
        num_iterations: int = 1,
        target: float = 0.0,
        fraction: float = 1.0,
    ) -> None:
        if quantity not in get_args(Quantity):
            raise ValueError(f"`quantity` must be one of {get_args(Quantity)}, got {quantity!r}.")
        if method != "auto" and method not in PRODUCTS:
            raise ValueError(f"`method` must be one of {('auto', *get_args(ProductName))}, got {method!r}.")
        _check_direction(quantity, method)
        least, most = {"mean_gain": (1, 1), "spectral_radius": (2, 10_000), "spectral_norm": (1, 10_000)}[quantity]
        if not least <= num_iterations <= most:
            raise ValueError(
                f"`num_iterations` must be in [{least}, {most}] for `quantity: {quantity}`, got {num_iterations}."
            )
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be in (0, 1], got {fraction}.")
        if target < 0:
            raise ValueError(f"`target` must be >= 0, got {target}.")
        self.quantity = quantity
        self.method: ProductName | Literal["auto"] = method
        self.num_iterations = num_iterations
        self.target = target
        self.fraction = fraction

    def __call__(
        self,
        step_fn: StepFn,
        hidden: Hidden,
        previous: Hidden,
        mask: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the penalty, a scalar; see :meth:`Penalty.__call__`."""
        hidden = pytree.tree_map(lambda x: x.detach(), hidden)
        measured = self._measure(step_fn, hidden, mask, generator)
        return measured.mean() if self.target == 0 else (measured - self.target).clamp_min(0).mean()

    def with_method(self, method: ProductName) -> JacobianPenalty:
        """Return the same penalty with another product.

        Raises:
            ValueError: If the quantity cannot be measured by it.
        """
        _check_direction(self.quantity, method)
        chosen = copy.copy(self)
        chosen.method = method
        return chosen

    def _measure(self, step_fn: StepFn, hidden: Hidden, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        method = _usual_product(hidden) if self.method == "auto" else self.method
        if self.quantity == "mean_gain":
            product = PRODUCTS[method](step_fn, hidden, random_unit(hidden, mask, generator))
            return squared_norm(mask_padding(product, mask))
        if self.quantity == "spectral_radius":
            return spectral_radius(
                step_fn, hidden, generator=generator, mask=mask, num_products=self.num_iterations, method=method
            )
        return spectral_norm(
            step_fn, hidden, generator=generator, mask=mask, num_iterations=self.num_iterations, method=method
        )


def _check_direction(quantity: Quantity, method: str) -> None:
    if quantity == "spectral_norm" and method == "vjp":
        raise ValueError("`quantity: spectral_norm` needs `J v`, got `method: vjp`: use `finite_difference` or `jvp`.")


def _usual_product(hidden: Hidden) -> ProductName:
    leaf = pytree.tree_leaves(hidden)[0]
    # Under autocast the state may be narrow while the weights are float32, which is what counts.
    narrow = torch.finfo(leaf.dtype).bits < 32 and not torch.is_autocast_enabled(leaf.device.type)
    return "jvp" if narrow or narrowed_products(leaf.device.type) else "finite_difference"


class StarsReleasePenalty(Penalty):
    """The authors' released estimate, for comparison: ``‖vᵀJ‖²`` with one v, normalised over batch × tokens × width.

    Sequences are independent, so J is block-diagonal over the batch and the value is the mean over all sequences with a
    single draw; padding is not left out. Reverse mode differentiated a second time, so attention takes its mathematical
    form. :class:`JacobianPenalty` has the same expectation
    where nothing is padded, at a lower cost and with a vector a sequence.

    Example:
        >>> h = torch.zeros(3, 5)
        >>> round(StarsReleasePenalty()(lambda x: 0.5 * x, h, h, None, torch.Generator()).item(), 4)
        0.25
    """

    method = "vjp"

    def __call__(
        self,
        step_fn: StepFn,
        hidden: Hidden,
        previous: Hidden,
        mask: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Return ``‖vᵀJ‖²``, a scalar; see :meth:`Penalty.__call__`."""
        hidden = pytree.tree_map(lambda x: x.detach(), hidden)
        vector = batch_unit(hidden, generator)
        with torch.enable_grad():
            return squared_norm(vjp(step_fn, hidden, vector)).sum()


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
