"""What strategy and precision ask of training: which product is right, sharding, means over all ranks, coarse weights.

Knows Lightning's strategies and torch's FSDP 2; of a model only that some of its blocks run once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from looplm.errors import InputError
from looplm.optimizers import share_of_lost_updates
from looplm.stability.choice import Parallelism, possible_products
from looplm.stability.penalty import JacobianPenalty, Penalty
from looplm.stability.products import narrowed_products
from looplm.stability.settling import SettlingPenalty

__all__ = ["choose_product", "count_labels", "shard_looped", "warn_of_lost_updates"]


def _parallelism(trainer: L.Trainer) -> Parallelism:
    strategy = trainer.strategy
    # Before DDPStrategy: Lightning derives DeepSpeed's from it.
    if isinstance(strategy, DeepSpeedStrategy):
        stage = strategy.config.get("zero_optimization", {}).get("stage", 0) if isinstance(strategy.config, dict) else 0
        return "deepspeed_stage_3" if str(stage) == "3" else "deepspeed"
    for kind, name in _KINDS:
        if isinstance(strategy, kind):
            return name
    return "single"


_KINDS: tuple[tuple[type, Parallelism], ...] = (
    (SingleDeviceStrategy, "single"),
    (ModelParallelStrategy, "fsdp2"),
    (FSDPStrategy, "fsdp1"),
    (DDPStrategy, "ddp"),
)


def _has_narrow_weights(trainer: L.Trainer) -> bool:
    # DeepSpeed's engine converts the weights whatever Lightning calls the precision; it keeps a wide copy to itself.
    narrow = str(trainer.precision).startswith(("bf16", "16"))
    return narrow and (isinstance(trainer.strategy, DeepSpeedStrategy) or not str(trainer.precision).endswith("mixed"))


def choose_product(penalty: Penalty | SettlingPenalty, trainer: L.Trainer) -> Penalty | SettlingPenalty:
    """Return the penalty with a product that is right under the trainer's strategy and precision, and say which.

    Warns where it is finite differences although float32 products are narrowed.

    Args:
        penalty: With ``method: auto`` it gets the best that works; with another method that one is checked.
        trainer: The trainer, its strategy set up.

    Raises:
        InputError: If the method does not work there, or none does.

    Example:
        >>> import lightning as L
        >>> from looplm import JacobianPenalty
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> choose_product(JacobianPenalty(method="auto"), trainer).method
        'finite_difference'
    """
    if isinstance(penalty, SettlingPenalty) or penalty.method is None:
        return penalty
    parallelism = _parallelism(trainer)
    narrowed, narrow_weights = narrowed_products(trainer.strategy.root_device.type), _has_narrow_weights(trainer)
    possible = possible_products(parallelism, narrow_weights=narrow_weights, narrowed=narrowed is not None)
    where = f"{parallelism} at precision {trainer.precision}"
    where += f" with products narrowed to {narrowed}" if narrowed else ""
    if not possible:
        raise InputError(
            f"`model.objective.penalty` works with no product under {where}: another strategy, or `precision` 32-true."
        )
    if penalty.method == "auto":
        assert isinstance(penalty, JacobianPenalty)
        penalty, reason = penalty.with_method(possible[0]), "chosen for"
    elif penalty.method in possible:
        reason = "asked for; right under"
    elif isinstance(penalty, JacobianPenalty):
        raise InputError(
            f"`model.objective.penalty.init_args.method` must be one of {('auto', *possible)} under {where}, "
            f"got {penalty.method!r}."
        )
    else:
        raise InputError(f"{type(penalty).__name__} needs the product {penalty.method!r}, which fails under {where}.")
    rank_zero_info(f"penalty: product {penalty.method}, {reason} {where}")
    if narrowed and penalty.method == "finite_difference":
        rank_zero_warn(
            f"the penalty's finite differences lose digits: float32 products are narrowed to {narrowed}. Use "
            "torch.set_float32_matmul_precision('highest') or, where it works, another `method`."
        )
    return penalty


def warn_of_lost_updates(trainer: L.Trainer, most: float = 0.5) -> None:
    """Warn where more than a share ``most`` of the weights cannot move: bfloat16 weights and a small learning rate.

    DeepSpeed updates a copy in float32.

    Example:
        >>> import lightning as L
        >>> warn_of_lost_updates(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return
    for optimizer in trainer.optimizers:
        lost = share_of_lost_updates(optimizer)
        if lost > most:
            rank_zero_warn(
                f"{lost:.0%} of the weights are too large to move: at `trainer.precision` {trainer.precision} an "
                "update of the learning rate's size rounds to nothing. Use bf16-mixed, which keeps them in float32."
            )


def count_labels(batch: Mapping[str, Any], trainer: L.Trainer) -> Tensor | None:
    """Return how many labelled tokens a micro-batch of this step has on average, a scalar; None: just its own.

    Gradients are averaged over ranks, and over the micro-batches that a step accumulates: losses divided by this number
    are the mean over all tokens, as one process would have it in one batch, whichever holds how many. What the other
    micro-batches have is the entry ``num_labels`` of :class:`~looplm.corpora.stream.TrainingStream`; without it a step
    is the mean of its micro-batches' means.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> count_labels({"labels": torch.tensor([[-100, 5, 6]])}, trainer) is None  # one rank
        True
    """
    count: Tensor | None = batch.get("num_labels")
    if trainer.world_size == 1:
        return count
    count = (batch["labels"] != -100).sum().float() if count is None else count
    mean: Tensor = trainer.strategy.reduce(count, reduce_op="mean")
    return mean


# Outside of these the parameters are shards, which no operation takes. The callbacks call the last four.
_ENTRIES = ("training_step", "validation_step", "test_step", "predict_step", "embed", "step", "decode", "exit_logit")


def shard_looped(root: nn.Module, outer_blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Apply FSDP 2: blocks that run once a step on their own, all the rest, the looped core with it, as one group.

    The group of the root is gathered once, kept for the whole step and scattered once, whatever the number of loops;
    sharding core blocks on their own would gather them at every loop, forward and backward. A group of its own is for
    prelude and coda blocks, whose weights need not be there while the core loops.

    Args:
        root: The module whose steps are called by the trainer.
        outer_blocks: Blocks inside ``root`` that run once a step.
        mesh: With the dimensions ``data_parallel`` and ``tensor_parallel``, as Lightning makes it.

    Raises:
        InputError: If there is tensor parallelism, which the model has none of: ranks would train on unsynchronised.

    Example:
        >>> shard_looped(model, [*model.prelude, *model.coda], mesh)  # doctest: +SKIP
    """
    if isinstance(root, FSDPModule):  # a trainer may fit and then test
        return
    if mesh["tensor_parallel"].size() != 1:
        raise InputError(
            f"`tensor_parallel_size` must be 1, got {mesh['tensor_parallel'].size()}: use `data_parallel_size`, "
            "or strategy looplm.ShardedStrategy, which sets both."
        )
    data_parallel = mesh["data_parallel"]
    for block in outer_blocks:
        fully_shard(block, mesh=data_parallel, reshard_after_forward=True)
    fully_shard(root, mesh=data_parallel, reshard_after_forward=False)
    for name in _ENTRIES:
        if hasattr(root, name):
            register_fsdp_forward_method(root, name)
