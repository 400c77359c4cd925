"""The table and the figures of measured dynamics. Knows numbers by depth, not models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from looplm.dynamics import QUANTITIES, Trajectory
from looplm.figures import accuracy_and_stability, quantity_by_depth
from looplm.state_figures import eigenvalue_plane, latent_paths

if TYPE_CHECKING:
    from looplm.figures import Figure

__all__ = ["DynamicsTable", "dynamics_figures"]

_ERROR = "mean_gain_standard_error"


@dataclass(frozen=True)
class DynamicsTable:
    """Quantities by depth, over the sequences of one evaluation set on all ranks.

    Attributes:
        depths: K depths, in loops.
        num_sequences: How many sequences were measured.
        mean: For each quantity its mean over sequences, K numbers; ``mean_gain_standard_error`` is that of the mean
            of ``mean_gain`` over the draws of v, for these sequences.
        least: The smallest sequence's value.
        most: The largest sequence's value.

    Example:
        >>> batches = [{"residual": torch.tensor([[0.5, 0.25], [0.1, 0.3]])}]  # (depths, sequences)
        >>> table = DynamicsTable.gather([1, 4], batches)
        >>> {key: round(value, 3) for key, value in table.scalars("val").items()}
        {'val/dynamics/residual/depth_00001': 0.375, 'val/dynamics/residual/depth_00004': 0.2}
    """

    depths: list[int]
    num_sequences: int
    mean: dict[str, list[float]]
    least: dict[str, list[float]]
    most: dict[str, list[float]]

    @classmethod
    def gather(
        cls,
        depths: list[int],
        batches: Sequence[Mapping[str, Tensor]],
        indices: Sequence[Tensor] | None = None,
        device: torch.device | None = None,
    ) -> DynamicsTable:
        """Combine batches, and with ``device`` all ranks (each must call).

        Args:
            depths: K depths.
            batches: For each batch and quantity ``(K, B)``.
            indices: For each batch which sequences those are, int64 ``(B,)``: one that comes again, as distributed
                samplers make it, does not count. None: all differ.
            device: Where this rank's process group gathers; None: there is one rank.

        Example:
            >>> table = DynamicsTable.gather([1, 2], [{"residual": torch.tensor([[1.0, 3.0], [0.0, 1.0]])}])
            >>> table.mean["residual"], table.most["residual"]
            ([2.0, 0.5], [3.0, 1.0])
        """
        names = list(batches[0])
        values = torch.stack([torch.cat([batch[name] for batch in batches], dim=1) for name in names]).double()
        index = None if indices is None else torch.cat([part.flatten() for part in indices])
        if device is not None:  # ranks may have measured different numbers of sequences
            values = torch.cat(gather_all_tensors(values.to(device)), dim=-1).cpu()
            index = None if index is None else torch.cat(gather_all_tensors(index.to(device))).cpu()
        if index is not None:
            values = values[..., _first_places(index)]
        count, mean = values.shape[-1], values.mean(-1)
        if _ERROR in names:  # errors of independent draws add in squares
            mean[names.index(_ERROR)] = values[names.index(_ERROR)].square().sum(-1).sqrt() / count
        by_name = [dict(zip(names, x.tolist(), strict=True)) for x in (mean, values.amin(-1), values.amax(-1))]
        return cls(depths, count, *by_name)

    def scalars(self, prefix: str) -> dict[str, float]:
        """Return the means under their log keys, ``{prefix}/dynamics/residual/depth_00008``; undefined are left out."""
        return {
            f"{prefix}/dynamics/{name}/depth_{depth:05d}": value
            for name in QUANTITIES
            if name in self.mean
            for depth, value in zip(self.depths, self.mean[name], strict=True)
            if not (name == "lyapunov_exponent" and depth == 0)
        }

    def rows(self, split: str) -> list[dict[str, float | str]]:
        """Return a row for each depth: mean, smallest and largest sequence of each quantity."""
        rows: list[dict[str, float | str]] = []
        for index, depth in enumerate(self.depths):
            row: dict[str, float | str] = {"split": split, "depth": depth, "num_sequences": self.num_sequences}
            for name, values in self.mean.items():
                row[name] = values[index]
                if name != _ERROR:
                    row |= {f"{name}_min": self.least[name][index], f"{name}_max": self.most[name][index]}
            rows.append(row)
        return rows


def _first_places(index: Tensor) -> list[int]:
    """Return where each value stands for the first time."""
    places: dict[int, int] = {}
    for place, value in enumerate(index.tolist()):
        places.setdefault(value, place)
    return list(places.values())


def _spans_decades(curves: Mapping[str, tuple[list[int], list[float]]]) -> bool:
    values = torch.tensor([v for _, column in curves.values() for v in column])
    values = values[values.isfinite() & (values > 0)]
    return len(values) > 0 and bool(values.max() > 20 * values.min())


def _quantity_figures(tables: Mapping[str, DynamicsTable]) -> dict[str, Figure]:
    """Return the figures of quantities by depth, by their names."""

    def curves(**labels: str) -> dict[str, tuple[list[int], list[float]]]:
        drawn = {}
        for split, table in tables.items():
            for name, label in labels.items():
                if name in table.mean:
                    values = [v**0.5 for v in table.mean[name]] if name == "mean_gain" else table.mean[name]
                    title = " ".join(part for part in (split if len(tables) > 1 or not label else "", label) if part)
                    drawn[title] = (table.depths, values)
        return drawn

    figures = {
        "residual": quantity_by_depth(
            curves(residual=""),
            title="Residual by depth",
            ylabel="residual ‖Φ(h) − h‖ / ‖Φ(h)‖ (log scale)",
            log_scale=True,
        )
    }
    norms = curves(state_norm="")
    log_scale = _spans_decades(norms)
    unit = " (log scale)" if log_scale else ""
    figures["state_norm"] = quantity_by_depth(
        norms, title="State norm by depth", ylabel=f"state norm ‖h‖{unit}", log_scale=log_scale, from_zero=not log_scale
    )
    gains = curves(
        spectral_radius="spectral radius ρ(J)", spectral_norm="spectral norm ‖J‖₂", mean_gain="√(mean gain E‖Jv‖²)"
    )
    if gains:
        log_scale = _spans_decades(gains)
        figures["gains"] = quantity_by_depth(
            gains,
            title="How much one loop stretches a perturbation",
            ylabel="factor per loop" + (" (log scale)" if log_scale else ""),
            log_scale=log_scale,
            threshold=1.0,
            threshold_label="1: a perturbation keeps its size",
            from_zero=not log_scale,
        )
    exponents = curves(lyapunov_exponent="")
    if exponents:
        figures["lyapunov"] = quantity_by_depth(
            exponents,
            title="Finite-time Lyapunov exponent by depth",
            ylabel="mean growth of a perturbation (nats per loop)",
            threshold=0.0,
            threshold_label="0: a perturbation keeps its size",
        )
    return figures


def _path_figures(trajectory: Trajectory) -> dict[str, Figure]:
    finite = trajectory.states.isfinite().all(-1).all(-1)
    kept = [index for index, good in enumerate(finite.tolist()) if good]
    if len(kept) < 2:
        return {}
    depths = [trajectory.depths[index] for index in kept]
    residuals = trajectory.residuals[kept]
    trajectory = Trajectory(depths, trajectory.states[kept].cpu(), residuals)
    figures = {}
    for dims in (2, 3):
        if dims <= min(trajectory.states.shape[0] * trajectory.states.shape[1], trajectory.states.shape[2]):
            coordinates, shares = trajectory.principal_components(dims)
            figures[f"paths_{dims}d"] = latent_paths(
                coordinates.numpy(), depths, shares.tolist(), residuals=residuals[-1].tolist()
            )
    return figures


def _overlay(stage: str, tables: Mapping[str, DynamicsTable], accuracies: Mapping[str, float]) -> dict[str, Figure]:
    for split, table in tables.items():
        prefix = f"{stage}/exact_match/depth_" if split == stage else f"{stage}/{split}/exact_match/depth_"
        found = {int(key.removeprefix(prefix)): v for key, v in accuracies.items() if key.startswith(prefix)}
        if found and "spectral_radius" in table.mean:
            depths = sorted(found)
            return {
                "accuracy_and_stability": accuracy_and_stability(
                    depths,
                    [found[depth] for depth in depths],
                    table.depths,
                    table.mean["spectral_radius"],
                    stability_label="spectral radius ρ(J)",
                )
            }
    return {}


def dynamics_figures(
    stage: str,
    tables: Mapping[str, DynamicsTable],
    trajectory: Trajectory,
    eigenvalues: Tensor | None,
    accuracies: Mapping[str, float],
) -> dict[str, Figure]:
    """Draw all that was measured.

    Args:
        stage: ``val`` or ``test``.
        tables: By the evaluation set's name; the stage where it has none.
        trajectory: Whose paths are drawn.
        eigenvalues: At the deepest depth, complex ``(sequences, k)``, NaN where undefined, or None.
        accuracies: Logged values; those under ``{stage}/exact_match/depth_…`` are drawn over ρ.

    Returns:
        The figures by their names.
    """
    figures = _quantity_figures(tables) | _overlay(stage, tables, accuracies) | _path_figures(trajectory)
    if eigenvalues is not None:
        named = {f"sequence {index}": row.tolist() for index, row in enumerate(eigenvalues)}
        title = f"Leading eigenvalues at depth {trajectory.depths[-1]:,}"
        figures["eigenvalues"] = eigenvalue_plane(named, title=title)
    return figures
