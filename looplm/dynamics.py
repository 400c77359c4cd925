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

from looplm.loop import Hidden, LoopedModel, LoopState, check_depths, unroll_at
from looplm.randomness import fold
from looplm.stability.estimators import growth, mean_gain, spectral_norm, spectral_radius
from looplm.stability.products import ProductName, product_named
from looplm.stability.vectors import StepFn, flatten, mask_padding, random_unit, squared_norm

__all__ = [
    "QUANTITIES",
    "Trajectory",
    "finite_time_lyapunov",
    "fixed_point_residual",
    "measure_dynamics",
    "step_function",
]

QUANTITIES = (
    "residual",
    "state_norm",
    "mean_gain",
    "spectral_norm",
    "spectral_radius",
    "lyapunov_exponent",
)
"""What :func:`measure_dynamics` can measure."""


def step_function(model: LoopedModel, state: LoopState) -> StepFn:
    """Return Φ as a function of the latent state alone, at the context and depth of ``state``.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> state = model.eval().embed(torch.zeros(1, 3, dtype=torch.long))
        >>> torch.equal(step_function(model, state)(state.hidden), model.step(state).hidden)
        True
    """

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
        method: The product; not ``vjp``, whose transposed Jacobians would come in the wrong order.

    Returns:
        float ``(num_loops, B)``, in nats per loop.

    Raises:
        ValueError: If ``num_loops`` is below 1 or ``method`` is ``vjp``.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> state = model.eval().embed(torch.zeros(2, 3, dtype=torch.long))
        >>> finite_time_lyapunov(model, state, 4, generator=torch.Generator()).shape
        torch.Size([4, 2])
    """
    if method == "vjp":
        raise ValueError("a Lyapunov exponent needs `J v`, got `vjp`: use `finite_difference` or `jvp`.")
    if num_loops < 1:
        raise ValueError(f"`num_loops` must be >= 1, got {num_loops}.")
    mask = state.context.get("attention_mask")
    vector = random_unit(state.hidden, mask, generator)
    logs = []
    for _ in range(num_loops):
        norm, vector = growth(product_named(method)(step_function(model, state), state.hidden, vector), mask)
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

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> state = model.eval().embed(torch.zeros(2, 3, dtype=torch.long))
        >>> path = measure_dynamics(model, state, [0, 1, 4], num_products=0, num_iterations=0)[1]
        >>> path.residuals.shape
        torch.Size([3, 2])
    """

    depths: list[int]
    states: Tensor
    residuals: Tensor

    @property
    def norms(self) -> Tensor:
        """``‖h‖`` at each depth, ``(K, B)``."""
        norms: Tensor = self.states.norm(dim=-1)
        return norms

    def principal_components(self, num_components: int = 3) -> tuple[Tensor, Tensor]:
        """Project the states on the principal components of all of them.

        Args:
            num_components: C, at most ``min(K·B, N)``.

        Returns:
            Coordinates ``(K, B, C)``, and the share of the variance each component explains ``(C,)``.

        Raises:
            ValueError: If there are fewer components than asked for.
        """
        most = min(self.states.shape[0] * self.states.shape[1], self.states.shape[2])
        if not 1 <= num_components <= most:
            raise ValueError(f"`num_components` must be in [1, {most}] for these states, got {num_components}.")
        flat = self.states.flatten(0, 1)
        _, singular, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        shares = singular.square() / singular.square().sum().clamp_min(torch.finfo(singular.dtype).tiny)
        coordinates = (flat - flat.mean(0)) @ axes[:num_components].T
        return coordinates.unflatten(0, self.states.shape[:2]), shares[:num_components]


@torch.no_grad()
def measure_dynamics(
    model: LoopedModel,
    state: LoopState,
    depths: Sequence[int],
    *,
    seed: int = 0,
    method: ProductName = "finite_difference",
    num_products: int = 50,
    num_samples: int = 8,
    num_iterations: int = 10,
    with_lyapunov: bool = True,
) -> tuple[dict[str, Tensor], Trajectory]:
    """Measure a trajectory at several depths, in one pass of ``max(depths)`` steps and the products at each depth.

    Args:
        model: Any looped model, deterministic (eval mode).
        state: A state at depth 0.
        depths: K increasing depths.
        seed: Every random vector is a function of it and of the quantity: equal at every depth.
        method: The product.
        num_products: For ``spectral_radius`` at each depth; 0: not measured.
        num_samples: Draws for ``mean_gain`` at each depth, at least 2; 0: not measured.
        num_iterations: For ``spectral_norm`` at each depth, two products each; 0: not measured.
        with_lyapunov: Whether to follow a perturbation along the trajectory, one product a step.

    Returns:
        For each quantity of :data:`QUANTITIES` that is measured its values ``(K, B)``, on the CPU, and with
        ``mean_gain`` its ``mean_gain_standard_error``; the exponent is NaN at depth 0. And the states.

    Raises:
        ValueError: If ``depths`` are not increasing, or ``method`` is ``vjp`` with ``num_iterations`` or
            ``with_lyapunov``.

    Example:
        >>> from looplm import LoopedConfig, LoopedTransformer
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> state = model.eval().embed(torch.zeros(2, 3, dtype=torch.long))
        >>> quantities, path = measure_dynamics(model, state, [1, 4], num_products=12, num_iterations=2)
        >>> quantities["spectral_radius"].shape
        torch.Size([2, 2])
    """
    depths = check_depths("depths", depths)
    mask = state.context.get("attention_mask")
    columns: dict[str, list[Tensor]] = {}
    kept: list[Tensor] = []
    if with_lyapunov and depths[-1] > 0:
        generator = torch.Generator().manual_seed(fold(seed, "lyapunov_exponent"))
        exponents = finite_time_lyapunov(model, state, depths[-1], generator=generator, method=method)
        undefined = torch.full_like(exponents[:1], torch.nan)
        columns["lyapunov_exponent"] = list(torch.cat([undefined, exponents])[depths])
    for _, current in unroll_at(model, state, depths):
        step_fn, hidden = step_function(model, current), current.hidden
        kept.append(flatten(mask_padding(hidden, mask)).float())
        found = {"residual": fixed_point_residual(hidden, step_fn(hidden), mask), "state_norm": kept[-1].norm(dim=-1)}
        if num_samples:
            generator = torch.Generator().manual_seed(fold(seed, "mean_gain"))
            estimate = mean_gain(
                step_fn, hidden, generator=generator, mask=mask, num_samples=num_samples, method=method
            )
            found |= {"mean_gain": estimate.value, "mean_gain_standard_error": estimate.standard_error}
        if num_iterations:
            generator = torch.Generator().manual_seed(fold(seed, "spectral_norm"))
            found["spectral_norm"] = spectral_norm(
                step_fn, hidden, generator=generator, mask=mask, num_iterations=num_iterations, method=method
            )
        if num_products:
            generator = torch.Generator().manual_seed(fold(seed, "spectral_radius"))
            found["spectral_radius"] = spectral_radius(
                step_fn, hidden, generator=generator, mask=mask, num_products=num_products, method=method
            )
        for name, values in found.items():
            columns.setdefault(name, []).append(values)
    measured = {name: torch.stack(values).float().cpu() for name, values in columns.items()}
    return measured, Trajectory(depths, torch.stack(kept), measured["residual"])
