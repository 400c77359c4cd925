"""Say in plain words that a loop is not stable. Reads what LatentDynamicsMonitor logs and calls nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from looplm.callbacks.latent_dynamics import LatentDynamicsMonitor

__all__ = ["StabilityWarning", "stability_problems"]

_KEY = re.compile(r"(?P<prefix>.+)/dynamics/(?P<quantity>spectral_radius|residual)/depth_(?P<depth>\d+)")


def stability_problems(
    residuals: Mapping[int, float],
    radii: Mapping[int, float],
    *,
    max_radius: float = 1.0,
    growth: float = 1.5,
    tolerance: float = 1e-3,
) -> list[str]:
    """Return what speaks against holding accuracy at larger depths, a sentence each.

    Args:
        residuals: Residual ``‖Φ(h) − h‖ / ‖Φ(h)‖`` by depth (loops).
        radii: Spectral radius by depth.
        max_radius: ρ at the deepest depth may not be above this.
        growth: The residual at the deepest depth may not be above so many times its smallest value before.
        tolerance: A residual below this counts as none.

    Example:
        >>> stability_problems({1: 0.1, 8: 0.01, 64: 0.4}, {64: 0.9})[0].split(":")[0]
        'the residual grows with depth, from 0.01 at depth 8 to 0.4 at depth 64'
        >>> stability_problems({1: 0.1, 64: 0.01}, {64: 0.9})
        []
    """
    problems = []
    deepest = max(radii, default=0)
    # Written so that NaN, a state that has overflowed, is a problem too.
    if radii and not radii[deepest] <= max_radius:
        problems.append(
            f"the spectral radius is {radii[deepest]:.3g}, above {max_radius:g}, at depth {deepest}, the deepest "
            "evaluated: a small disturbance of the state grows with every further loop"
        )
    deepest = max(residuals, default=0)
    earlier = {depth: value for depth, value in residuals.items() if depth < deepest}
    if earlier:
        best = min(earlier, key=lambda depth: earlier[depth])
        if not residuals[deepest] <= max(growth * earlier[best], tolerance):
            problems.append(
                f"the residual grows with depth, from {earlier[best]:.3g} at depth {best} to "
                f"{residuals[deepest]:.3g} at depth {deepest}: the state moves away from a fixed point"
            )
    return problems


class StabilityWarning(L.Callback):
    """Warns once, in plain words, when a loop is unstable at the deepest evaluated state.

    After every validation and test it reads what
    :class:`~looplm.callbacks.latent_dynamics.LatentDynamicsMonitor` has logged (means over sequences), and warns of a
    spectral radius above ``max_radius`` at the deepest depth, of a residual that grows with depth, or of either not
    being finite. During ``fit`` a model that has learnt nothing yet is often unstable: ``start_step`` waits.

    Args:
        max_radius: Largest ρ that is not worth a warning.
        growth: How many times its smallest value the residual may be at the deepest depth.
        tolerance: A residual below this counts as none.
        start_step: Optimiser step of ``fit`` before which nothing is said.

    Raises:
        ValueError: If a value is out of its range, or there is no monitor in the trainer's callbacks.

    Example:
        >>> callbacks = [LatentDynamicsMonitor(), StabilityWarning(start_step=1_000)]
        >>> trainer = L.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, max_radius: float = 1.0, growth: float = 1.5, tolerance: float = 1e-3, start_step: int = 0
    ) -> None:
        if max_radius <= 0 or growth < 1 or tolerance < 0 or start_step < 0:
            raise ValueError(
                "`max_radius` must be > 0, `growth` >= 1, `tolerance` and `start_step` >= 0, "
                f"got {max_radius}, {growth}, {tolerance} and {start_step}."
            )
        self.max_radius, self.growth, self.tolerance, self.start_step = max_radius, growth, tolerance, start_step
        self._has_warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there is something to read."""
        if not any(isinstance(callback, LatentDynamicsMonitor) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("StabilityWarning reads what LatentDynamicsMonitor logs: add one to the callbacks.")

    def _check(self, trainer: L.Trainer, stage: str) -> None:
        values: dict[str, dict[str, dict[int, float]]] = {}
        for key, value in trainer.callback_metrics.items():  # computed on all ranks
            found = _KEY.fullmatch(key)
            if found and found["prefix"].split("/")[0] == stage:
                by_depth = values.setdefault(found["prefix"], {}).setdefault(found["quantity"], {})
                by_depth[int(found["depth"])] = float(value)
        waits = trainer.state.fn == TrainerFn.FITTING and trainer.global_step < self.start_step
        if self._has_warned or trainer.sanity_checking or waits:
            return
        for prefix, quantities in sorted(values.items()):
            problems = stability_problems(
                quantities.get("residual", {}),
                quantities.get("spectral_radius", {}),
                max_radius=self.max_radius,
                growth=self.growth,
                tolerance=self.tolerance,
            )
            if problems:
                self._has_warned = True
                rank_zero_warn(
                    f"This loop is not stable ({prefix}, step {trainer.global_step}): {'; and '.join(problems)}. "
                    "Expect accuracy to fall at larger depths. Training at random depths and JacobianPenalty help. "
                    "This is said once.",
                    category=UserWarning,
                )
                return

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the validation's numbers."""
        self._check(trainer, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the test's numbers."""
        self._check(trainer, "test")
