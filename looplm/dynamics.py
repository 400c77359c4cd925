"""What a trajectory does: residuals, norms, growth of perturbations, principal components.

Knows the contract of looped models, no transformer and no training. Vectors are per sequence and restricted to real
positions, as in :mod:`looplm.stability.vectors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from looplm.loop import Hidden, LoopedModel, LoopState
from looplm.stability.estimators import growth
from looplm.stability.products import PRODUCTS, ProductName
from looplm.stability.vectors import StepFn, flatten, mask_padding, random_unit, squared_norm

__all__ = ["Trajectory", "finite_time_lyapunov", "fixed_point_residual", "step_function"]


def step_function(model: LoopedModel, state: LoopState) -> StepFn:
    """Return Φ as a function of the latent state alone, at the context and depth of ``state``."""

    def step_fn(hidden: Hidden) -> Hidden:
        return model.step(LoopState(hidden, state.context, state.depth)).hidden

    return step_fn


def fixed_point_residual(hidden: Hidden, following: Hidden, mask: Tensor | None = None) -> Tensor:
    """Return ``‖Φ(h) − h‖ / ‖Φ(h)‖`` of each sequence, ``(B,)``.

    Args:
        hidden: h, ``(B, …)``.
        following: Φ(h), of the same shapes.
        mask: ``(B, T)``, non-zero at real positions, or None.

    Example:
        >>> fixed_point_residual(torch.tensor([[1.0]]), torch.tensor([[2.0]])).item()
        0.5
    """
    change = mask_padding(pytree.tree_map(torch.sub, following, hidden), mask)
    size = squared_norm(mask_padding(following, mask)).sqrt()
    return squared_norm(change).sqrt() / size.clamp_min(torch.finfo(size.dtype).tiny)


@torch.no_grad()
def finite_time_lyapunov(
    model: LoopedModel,
    state: LoopState,
    num_loops: int,
    *,
    generator: torch.Generator,
    method: ProductName = "finite_difference",
) -> Tensor:
    """Return the finite-time Lyapunov exponent along a trajectory, after each of its steps.

    ``λ_t = (1/t) Σ_{s<t} log(‖J_s v_s‖ / ‖v_s‖)`` with ``v_{s+1} = J_s v_s`` and ``J_s`` the Jacobian at ``h_s``, from
    a random ``v_0``: the mean logarithmic growth of a small perturbation per loop; negative where it dies out.

    Args:
        model: Any looped model, deterministic (eval mode).
        state: Where the trajectory starts.
        num_loops: Its length.
        generator: The source of ``v_0``.
        method: The product.

    Returns:
        float ``(num_loops, B)``, in nats per loop.
    """
    mask = state.context.get("attention_mask")
    vector = random_unit(state.hidden, mask, generator)
    logs = []
    for _ in range(num_loops):
        norm, vector = growth(PRODUCTS[method](step_function(model, state), state.hidden, vector), mask)
        logs.append(norm.log())
        state = model.step(state)
    steps = torch.arange(1, num_loops + 1, device=logs[0].device)[:, None]
    return torch.stack(logs).cumsum(0) / steps


@dataclass(frozen=True)
class Trajectory:
    """States of a batch along a trajectory, at increasing depths.

    Attributes:
        depths: K depths.
        states: The flattened states, padded positions zero, float32 ``(K, B, N)``.
        residuals: ``‖Φ(h) − h‖ / ‖Φ(h)‖`` at each, ``(K, B)``.
    """

    depths: list[int]
    states: Tensor
    residuals: Tensor

    @classmethod
    @torch.no_grad()
    def record(cls, model: LoopedModel, state: LoopState, depths: Sequence[int]) -> Trajectory:
        """Run a model to ``max(depths) + 1`` steps and keep the states at ``depths``.

        Args:
            model: Any looped model, in eval mode.
            state: A state at depth 0.
            depths: K strictly increasing depths.
        """
        mask = state.context.get("attention_mask")
        kept, residuals = [], []
        wanted = set(depths)
        for depth in range(max(depths) + 1):
            following = model.step(state)
            if depth in wanted:
                kept.append(flatten(mask_padding(state.hidden, mask)).float())
                residuals.append(fixed_point_residual(state.hidden, following.hidden, mask))
            state = following
        return cls(sorted(wanted), torch.stack(kept), torch.stack(residuals))

    @property
    def norms(self) -> Tensor:
        """``‖h‖`` at each depth, ``(K, B)``."""
        return self.states.norm(dim=-1)

    def principal_components(self, num_components: int = 3) -> tuple[Tensor, Tensor]:
        """Project the states on the principal components of all of them.

        Args:
            num_components: C, at most ``min(K·B, N)``.

        Returns:
            Coordinates ``(K, B, C)``, and the share of the variance each component explains ``(C,)``.
        """
        flat = self.states.flatten(0, 1)
        _, singular, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        shares = singular.square() / singular.square().sum().clamp_min(torch.finfo(singular.dtype).tiny)
        coordinates = (flat - flat.mean(0)) @ axes[:num_components].T
        return coordinates.unflatten(0, self.states.shape[:2]), shares[:num_components]
