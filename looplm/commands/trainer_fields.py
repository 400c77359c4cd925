"""Numbers of `trainer` that Lightning would divide by, or take without a word; two that do not go together.

Knows plain values and no trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["check_trainer_fields"]

Rule = tuple[Callable[[float], bool], str]

_AT_LEAST_ONE: Rule = (lambda value: value >= 1, ">= 1")
_NOT_NEGATIVE: Rule = (lambda value: value >= 0, ">= 0")
_POSITIVE: Rule = (lambda value: value > 0, "> 0")
_RULES = {
    "accumulate_grad_batches": _AT_LEAST_ONE,
    "check_val_every_n_epoch": _AT_LEAST_ONE,
    "val_check_interval": _POSITIVE,
    "gradient_clip_val": _NOT_NEGATIVE,
    "log_every_n_steps": _NOT_NEGATIVE,
    "min_steps": _NOT_NEGATIVE,
    "min_epochs": _NOT_NEGATIVE,
}
_BATCHES = {"fit": "limit_train_batches", "validate": "limit_val_batches"}


def check_trainer_fields(subcommand: str, fields: Mapping[str, Any]) -> None:
    """Refuse numbers with which the subcommand would end in an error of Lightning's own arithmetic, or do nothing.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        fields: Those of ``trainer``; what is no number is Lightning's to judge.

    Raises:
        ValueError: Names the field, the value and what is allowed.

    Example:
        >>> check_trainer_fields("fit", {"accumulate_grad_batches": 2, "val_check_interval": None})
        >>> check_trainer_fields("fit", {"accumulate_grad_batches": 0})
        Traceback (most recent call last):
            ...
        ValueError: `trainer.accumulate_grad_batches` must be >= 1, got 0.
        >>> check_trainer_fields("fit", {"accumulate_grad_batches": 2, "limit_train_batches": 3})
        Traceback (most recent call last):
            ...
        ValueError: `trainer.limit_train_batches` must be a multiple of `trainer.accumulate_grad_batches` 2, got 3.
    """
    rules = {**_RULES, _BATCHES.get(subcommand, f"limit_{subcommand}_batches"): _POSITIVE}
    for name, (holds, allowed) in rules.items():
        value = fields.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not holds(value):
            raise ValueError(f"`trainer.{name}` must be {allowed}, got {value}.")
    if subcommand == "fit":
        _check_whole_steps(fields.get("limit_train_batches"), fields.get("accumulate_grad_batches"))


def _check_whole_steps(num_batches: Any, accumulated: Any) -> None:
    # Lightning steps at the end of an epoch whatever has been accumulated; no batch could say for how many it counts.
    if isinstance(num_batches, int) and isinstance(accumulated, int) and num_batches % accumulated:
        raise ValueError(
            f"`trainer.limit_train_batches` must be a multiple of `trainer.accumulate_grad_batches` {accumulated}, "
            f"got {num_batches}."
        )
