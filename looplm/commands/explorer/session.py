"""From a request of the page to plain data: checked, bounded, computed. Knows the opened model; no server, no page."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looplm.commands.exit_table import exits_of
from looplm.commands.explorer.opening import OpenedModel
from looplm.errors import InputError
from looplm.inspection import ExitInspection, InspectedAnswer, inspect_depths, inspect_exits

__all__ = ["MOST_CHARACTERS", "Limits", "Session", "shown_depths"]

MOST_CHARACTERS = 2000
"""Longest problem."""
_MOST_DEPTHS = 33
_FIELDS = {"problem", "max_depth"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may cost.

    Example:
        >>> Limits(max_depth=0)
        Traceback (most recent call last):
            ...
        ValueError: `max_depth` must be >= 1, got 0.
    """

    max_depth: int = 64
    """Greatest depth that can be asked for."""
    max_new_tokens: int = 32
    """Longest answer."""
    max_seconds: float = 120.0
    """Longest computation."""

    def __post_init__(self) -> None:
        for name in ("max_depth", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if not self.max_seconds > 0:
            raise ValueError(f"`max_seconds` must be > 0, got {self.max_seconds}.")


def shown_depths(greatest: int) -> list[int]:
    """Return the depths that are shown: all up to 32, else 0 to 8 and then ever fewer; 33 at most.

    Example:
        >>> shown_depths(4), len(shown_depths(4096)), shown_depths(4096)[-2:]
        ([0, 1, 2, 3, 4], 33, [3158, 4096])
    """
    if greatest < _MOST_DEPTHS:
        return list(range(greatest + 1))
    first, rest = 8, _MOST_DEPTHS - 9
    growth = (greatest / first) ** (1 / rest)
    return sorted({*range(first + 1), *(round(first * growth**k) for k in range(1, rest + 1))})


class Session:
    """Answers requests about one model, one at a time.

    Args:
        opened: The model and its form of problems.
        limits: What one request may cost.

    Example:
        >>> from looplm import ArithmeticDataModule, LoopedConfig, LoopedTransformer
        >>> from looplm.commands.explorer.forms import ArithmeticForm
        >>> form = ArithmeticForm(ArithmeticDataModule(min_digits=2, max_digits=2), max_positions=16)
        >>> config = LoopedConfig(vocab_size=17, max_positions=16, width=16, num_heads=2, ffn_width=24)
        >>> opened = OpenedModel("runs/sums", LoopedTransformer(config).eval(), form)
        >>> said = Session(opened, Limits(max_depth=2)).answer({"problem": "12+34"})
        >>> said["expected"], said["depths"], len(said["chosen"])
        ('46', [0, 1, 2], 3)
    """

    def __init__(self, opened: OpenedModel, limits: Limits) -> None:
        self._opened, self._limits = opened, limits
        self._exits = exits_of(opened.model)
        self._deadline, self._is_stopped = math.inf, False
        # Every loop comes by here, whatever runs it.
        opened.model.core[0].register_forward_pre_hook(self._check_time)

    def stop(self) -> None:
        """End what is being computed, and whatever is asked from now on, at its next loop."""
        self._is_stopped = True

    def _check_time(self, *arguments: object) -> None:
        if self._is_stopped:
            raise InputError("the server ends.")
        if time.monotonic() > self._deadline:
            raise InputError(
                f"the computation was stopped after {self._limits.max_seconds:g} seconds (`--max_seconds`); "
                "a smaller depth takes less."
            )

    def describe(self) -> dict[str, Any]:
        """Return what the page says of the model before anything is asked."""
        model, config = self._opened.model, self._opened.model.config
        number = sum(parameter.numel() for parameter in model.parameters())
        injection = "no injection" if config.input_injection == "none" else f"injection {config.input_injection}"
        norm = f"{config.norm_placement}, {config.norm_type}"
        return {
            "name": self._opened.name,
            "about": f"{number:,} parameters, width {config.width}, {norm}, {injection}",
            "example": self._opened.form.example,
            "max_depth": self._limits.max_depth,
            "max_characters": MOST_CHARACTERS,
        }

    def answer(self, request: Any) -> dict[str, Any]:
        """Return all that the page shows of a problem.

        Args:
            request: An object with ``problem``, a text, and optionally ``max_depth``, an integer.

        Raises:
            InputError: If it is something else, the model cannot take the problem, or it takes too long.
        """
        problem, greatest = self._checked(request)
        self._deadline = time.monotonic() + self._limits.max_seconds
        form, model = self._opened.form, self._opened.model
        ids = form.encode(problem)
        room = model.config.max_positions - len(ids) + 1
        if room < 1:
            raise InputError(f"the problem has {len(ids)} tokens, the model takes {model.config.max_positions}.")
        device = model.token_embedding.weight.device
        prompt = torch.tensor(ids, device=device)
        number = min(self._limits.max_new_tokens, room)
        depths = shown_depths(greatest)
        seen = inspect_depths(model, prompt, depths=depths, max_new_tokens=number, end_ids=form.end_ids)
        rules = {known.name: known.make(known.shown) for known in self._exits}
        stops = inspect_exits(model, prompt, rules, num_loops=greatest, max_new_tokens=number, end_ids=form.end_ids)
        return {
            "problem": problem,
            "prompt": form.tokens(ids),
            "expected": form.expected(problem),
            "depths": depths,
            "chosen": seen.chosen,
            "answers": [self._plain(answer) for answer in seen.answers],
            "exits": [
                {"name": known.name, "when": known.condition.format(known.shown), **self._stop(stops[known.name])}
                for known in self._exits
            ],
        }

    def _checked(self, request: Any) -> tuple[str, int]:
        if not isinstance(request, Mapping) or not set(request) <= _FIELDS:
            raise InputError(f"a request must be an object of {sorted(_FIELDS)}.")
        problem, greatest = request.get("problem"), request.get("max_depth", self._limits.max_depth)
        if not isinstance(problem, str) or not problem.strip():
            raise InputError("`problem` must be a text that is not empty.")
        if len(problem) > MOST_CHARACTERS:
            raise InputError(f"`problem` must have at most {MOST_CHARACTERS:,} characters, got {len(problem):,}.")
        if isinstance(greatest, bool) or not isinstance(greatest, int) or not 1 <= greatest <= self._limits.max_depth:
            raise InputError(
                f"`max_depth` must be an integer from 1 to {self._limits.max_depth}, got {greatest!r:.40}."
            )
        # A lone surrogate is no text and no tokenizer takes it.
        return problem.encode("utf-8", "replace").decode("utf-8"), greatest

    def _plain(self, answer: InspectedAnswer) -> dict[str, Any]:
        return {
            "tokens": self._opened.form.tokens(answer.tokens),
            "text": self._opened.form.answer(answer.tokens),
            "probability": _numbers(answer.probability),
            "entropy": _numbers(answer.entropy),
            "residual": _numbers(answer.residual),
            "path": _numbers(answer.path),
            "explained": _numbers(answer.explained),
        }

    def _stop(self, stop: ExitInspection) -> dict[str, Any]:
        form = self._opened.form
        return {
            "tokens": form.tokens(stop.tokens),
            "text": form.answer(stop.tokens),
            "loops": stop.loops,
            "mean_loops": stop.mean_loops,
        }


def _numbers(values: Tensor) -> Any:
    """Return nested lists of numbers of six digits; what is not finite, which JSON does not know, is null."""
    if values.ndim:
        return [_numbers(part) for part in values]
    value = values.item()
    return float(f"{value:.6g}") if math.isfinite(value) else None
