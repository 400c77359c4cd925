"""Measure what a loop does to its latent state, in any Lightning project whose model fulfils the contract.

The only callback that calls a model, through :class:`~looplm.loop.LoopedModel` alone; knows no module and no config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from looplm.callbacks.dynamics_report import DynamicsTable, dynamics_figures
from looplm.callbacks.output import publish_figure, step_of_figures, write_table
from looplm.dynamics import Trajectory, measure_dynamics, step_function
from looplm.loop import LoopedModel, LoopState, check_depths, unroll_at
from looplm.randomness import fold
from looplm.stability.products import ProductName, product_named
from looplm.stability.spectra import leading_eigenvalues, require_scipy

__all__ = ["InputsFn", "LatentDynamicsMonitor"]

InputsFn: TypeAlias = Callable[[Any], tuple[Any, Tensor | None]]
_METHODS = ("embed", "step", "decode")
_NUM_SPECTRA = 4  # sequences whose eigenvalues are drawn


@dataclass
class _Split:
    """What has been measured on one evaluation set."""

    name: str
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    trajectory: Trajectory | None = None
    eigenvalues: Tensor | None = None


def _default_inputs(batch: Any) -> tuple[Any, Tensor | None]:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        has = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise KeyError(
            f"LatentDynamicsMonitor reads `input_ids` (and `attention_mask`) from a batch, got {has}: pass "
            "`inputs_fn`, which makes (inputs, attention_mask or None) of a batch."
        )
    return batch["input_ids"], batch.get("attention_mask")


@contextlib.contextmanager
def _undisturbed(*modules: Any, seed: int) -> Iterator[None]:
    """Evaluation mode without gradients, for the duration; training flags and global random state are put back."""
    devices = {p.device for module in modules if isinstance(module, nn.Module) for p in module.parameters()}
    forked = [device for device in devices if device.type == "cuda"]
    flags = {m: m.training for module in modules if isinstance(module, nn.Module) for m in module.modules()}
    # Reverse mode (``spectral_norm``) works under no_grad, not in the inference mode that trainers evaluate in.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(forked):
        torch.manual_seed(seed)  # a random initial state is the same in every evaluation
        try:
            for module in flags:
                module.training = False
            yield
        finally:
            for module, training in flags.items():
                module.training = training


def _plain(x: Any) -> Any:
    """Return an inference tensor's copy that autograd may record."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


class LatentDynamicsMonitor(L.Callback):
    """Residual, state norm, gains, spectral radius and Lyapunov exponent of the loop, by depth.

    On the first ``num_sequences`` sequences of each of the first ``num_batches`` batches of every validation and test
    set it runs the loop itself, in evaluation mode, without gradient, on all ranks. It logs, as means over sequences
    (where the outputs hold ``index`` ``(B,)``, one that the distributed sampler repeats counts once),

    - ``{stage}/dynamics/residual/depth_00008``: ``‖Φ(h) − h‖ / ‖Φ(h)‖``;
    - ``…/state_norm/…``: ``‖h‖`` over real positions;
    - ``…/mean_gain/…``: ``E‖Jv‖²`` over random unit v;
    - ``…/spectral_norm/…`` and ``…/spectral_radius/…``: the largest singular value and ``|eigenvalue|``;
    - ``…/lyapunov_exponent/…``: mean growth of a small perturbation since depth 0, nats per loop;

    gives figures to every logger that takes them; and writes ``{stage}_dynamics.csv`` (mean, smallest and largest
    sequence) and ``{stage}_residual.png``, ``_state_norm.png``, ``_gains.png``, ``_lyapunov.png``, ``_paths_2d.png``,
    ``_paths_3d.png``, with ``num_eigenvalues`` ``_eigenvalues.png``, and beside
    :class:`~looplm.callbacks.depth_accuracy.DepthAccuracyCurve` ``_accuracy_and_stability.png`` into the log
    directory. With several dataloaders a ``split`` in the outputs (or ``set1``, ``set2``, …) stands after the stage.

    The model is the LightningModule itself, if it has ``embed``, ``step`` and ``decode``
    (:class:`~looplm.loop.LoopedModel`), or what ``looped_model_fn`` returns.

    Args:
        depths: Where to measure, increasing, in loops. At depth 0 stands what ``embed`` returns, often on another scale
            than all states after it.
        num_batches: Batches of each dataloader and rank.
        num_sequences: Sequences of each batch.
        inputs_fn: ``inputs_fn(batch)`` returns ``(inputs, attention_mask or None)`` for ``embed``; None: reads
            ``input_ids`` and ``attention_mask``.
        looped_model_fn: ``looped_model_fn(pl_module)`` returns the looped model; None: the module itself.
        method: The product with the Jacobian, see :mod:`looplm.stability.products`.
        num_products: Products for the spectral radius at each depth; 0: none.
        num_samples: Products for the mean gain at each depth, at least 2; 0: none.
        num_iterations: Iterations, of two products each, for the spectral norm at each depth; 0: none.
        with_lyapunov: Whether to follow a perturbation, one product a loop.
        num_eigenvalues: Leading eigenvalues at the deepest depth, of up to 4 sequences (needs SciPy); 0: none.
        every_n_evaluations: During ``fit`` only every n-th validation is measured, the first included.
        with_figures: Whether to draw figures (a second or so an evaluation), not the table alone.
        seed: Seed of all random vectors. The global random state is neither read nor changed.

    Raises:
        ValueError: If a number is out of its range, or ``method="vjp"`` meets a quantity that needs ``J v``.
        ModuleNotFoundError: If ``num_eigenvalues`` > 0 and SciPy is not installed.

    Example:
        >>> monitor = LatentDynamicsMonitor(depths=[1, 4, 16, 64], num_sequences=4)
        >>> trainer = L.Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        depths: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
        *,
        num_batches: int = 1,
        num_sequences: int = 8,
        inputs_fn: InputsFn | None = None,
        looped_model_fn: Callable[[Any], LoopedModel] | None = None,
        method: ProductName = "finite_difference",
        num_products: int = 50,
        num_samples: int = 8,
        num_iterations: int = 10,
        with_lyapunov: bool = True,
        num_eigenvalues: int = 0,
        every_n_evaluations: int = 1,
        with_figures: bool = True,
        seed: int = 0,
    ) -> None:
        self.depths = check_depths("depths", depths)
        least = {"num_batches": 1, "num_sequences": 1, "every_n_evaluations": 1}
        counts = {
            "num_batches": num_batches,
            "num_sequences": num_sequences,
            "every_n_evaluations": every_n_evaluations,
            "num_products": num_products,
            "num_samples": num_samples,
            "num_iterations": num_iterations,
            "num_eigenvalues": num_eigenvalues,
        }
        for name, value in counts.items():
            if value < least.get(name, 0):
                raise ValueError(f"`{name}` must be >= {least.get(name, 0)}, got {value}.")
        if num_samples == 1:
            raise ValueError("`num_samples` must be 0 or >= 2 (it has a standard error), got 1.")
        product_named(method)
        if method == "vjp" and (num_iterations or with_lyapunov):
            raise ValueError(
                "`method: vjp` cannot measure the spectral norm and the Lyapunov exponent: set `num_iterations: 0` "
                "and `with_lyapunov: false`, or use `finite_difference` or `jvp`."
            )
        if num_eigenvalues and not with_figures:
            raise ValueError("`num_eigenvalues` has no effect without `with_figures`: they are drawn, not logged.")
        if num_eigenvalues:
            require_scipy("num_eigenvalues")
        self.num_batches, self.num_sequences = num_batches, num_sequences
        self.inputs_fn, self.looped_model_fn = inputs_fn or _default_inputs, looped_model_fn
        self.method = method
        self.num_products, self.num_samples, self.num_iterations = num_products, num_samples, num_iterations
        self.with_lyapunov, self.num_eigenvalues = with_lyapunov, num_eigenvalues
        self.every_n_evaluations, self.with_figures, self.seed = every_n_evaluations, with_figures, seed
        self._num_evaluations = 0
        self._active = False
        self._splits: dict[int, _Split] = {}
        self._tables: dict[str, DynamicsTable] = {}

    def _model(self, pl_module: L.LightningModule) -> LoopedModel:
        model: Any = pl_module if self.looped_model_fn is None else self.looped_model_fn(pl_module)
        missing = [name for name in _METHODS if not callable(getattr(model, name, None))]
        if missing:
            raise TypeError(
                f"LatentDynamicsMonitor needs a model with {list(_METHODS)}, {type(model).__name__} lacks {missing}: "
                "define them (see looplm.LoopedModel), or pass `looped_model_fn` to make such a model of your module."
            )
        return cast(LoopedModel, model)

    def _measure(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, where: tuple[int, int]
    ) -> None:
        batch_idx, dataloader_idx = where
        if not self._active or trainer.sanity_checking or batch_idx >= self.num_batches:
            return
        model = self._model(pl_module)
        seed = fold(self.seed, "dynamics", trainer.global_rank, dataloader_idx, batch_idx)
        with _undisturbed(pl_module, model, seed=seed), trainer.precision_plugin.forward_context():
            inputs, mask = pytree.tree_map(_plain, self.inputs_fn(batch))
            state = model.embed(inputs, mask)
            leaf = pytree.tree_leaves(state.hidden)[0]
            state = state.select(torch.arange(min(self.num_sequences, len(leaf)), device=leaf.device))
            values, trajectory = measure_dynamics(
                model,
                state,
                self.depths,
                seed=seed,
                method=self.method,
                num_products=self.num_products,
                num_samples=self.num_samples,
                num_iterations=self.num_iterations,
                with_lyapunov=self.with_lyapunov,
            )
            split = self._splits.setdefault(dataloader_idx, _Split(self._split_name(outputs, dataloader_idx)))
            split.batches.append(values)
            if isinstance(outputs, Mapping) and "index" in outputs:
                split.indices.append(torch.as_tensor(outputs["index"])[: self.num_sequences].cpu())
            if split.trajectory is None:
                split.trajectory = trajectory
                split.eigenvalues = self._eigenvalues(model, state) if self.num_eigenvalues else None

    @staticmethod
    def _split_name(outputs: Any, dataloader_idx: int) -> str:
        named = outputs.get("split") if isinstance(outputs, Mapping) else None
        if isinstance(named, str):
            return named
        return f"set{dataloader_idx}" if dataloader_idx else ""

    def _eigenvalues(self, model: LoopedModel, state: LoopState) -> Tensor:
        """Return leading eigenvalues at the deepest depth, complex ``(sequences, num_eigenvalues)``."""
        ((_, deepest),) = unroll_at(model, state, self.depths[-1:])
        leaf = pytree.tree_leaves(deepest.hidden)[0]
        found = []
        for row in range(min(_NUM_SPECTRA, len(leaf))):
            # One sequence at a time: the others would ride along through every product.
            alone = deepest.select(torch.tensor([row], device=leaf.device))
            step_fn, mask = step_function(model, alone), alone.context.get("attention_mask")
            found.append(
                leading_eigenvalues(step_fn, alone.hidden, self.num_eigenvalues, mask=mask, method=self.method)
            )
        return torch.cat(found)

    def _start(self, trainer: L.Trainer, stage: str) -> None:
        self._splits, self._tables = {}, {}
        if trainer.sanity_checking:
            return
        fitting = stage == "val" and trainer.state.fn == TrainerFn.FITTING
        self._active = not fitting or self._num_evaluations % self.every_n_evaluations == 0
        self._num_evaluations += fitting

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for split in self._splits.values():
            device = pl_module.device if trainer.world_size > 1 else None
            table = DynamicsTable.gather(self.depths, split.batches, split.indices or None, device)
            key = "/".join(part for part in (stage, split.name) if part)
            pl_module.log_dict(table.scalars(key), rank_zero_only=False, sync_dist=trainer.world_size > 1)
            self._tables[split.name or stage] = table

    def _write(self, trainer: L.Trainer, stage: str) -> None:
        log_dir = trainer.log_dir  # a broadcast: on all ranks
        # Accuracies that another callback has logged in this evaluation, whichever of the two came first.
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        step = step_of_figures(trainer)
        if self._tables:
            self._report(trainer, stage, Path(log_dir or trainer.default_root_dir), logged, step)
        self._splits, self._tables = {}, {}

    @rank_zero_only
    def _report(self, trainer: L.Trainer, stage: str, folder: Path, logged: Mapping[str, float], step: int) -> None:
        rows = [row for name, table in self._tables.items() for row in table.rows(name)]
        write_table(folder / f"{stage}_dynamics.csv", rows)
        first = next(iter(self._splits.values()))
        if self.with_figures and first.trajectory is not None:
            figures = dynamics_figures(stage, self._tables, first.trajectory, first.eigenvalues, logged)
            for name, figure in figures.items():
                publish_figure(trainer, f"{stage}/dynamics/{name}", figure, folder / f"{stage}_{name}.png", step)

    def state_dict(self) -> dict[str, Any]:
        """Return how many validations there have been, so that a resumed run measures the same ones."""
        return {"num_evaluations": self._num_evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count of validations."""
        self._num_evaluations = state_dict["num_evaluations"]

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self._start(trainer, "val")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the first batches."""
        self._measure(trainer, pl_module, outputs, batch, (batch_idx, dataloader_idx))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was measured."""
        self._log(trainer, pl_module, "val")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write table and figures."""
        self._write(trainer, "val")

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self._start(trainer, "test")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was measured."""
        self._log(trainer, pl_module, "test")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write table and figures."""
        self._write(trainer, "test")
