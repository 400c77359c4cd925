"""Reads the fields of a stranger's config.json, each with its own message. Knows no family."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from looplm.config import LoopedConfig
from looplm.errors import InputError

__all__ = ["FieldReader", "build_config"]


class FieldReader:
    """Reads fields and says in one line what is wrong with them; null is as good as absent.

    Every method raises an :class:`~looplm.errors.InputError` that names the field, what it holds and what is allowed.

    Example:
        >>> FieldReader({"hidden_size": 2048, "head_dim": None}).count("head_dim", default=128)
        128
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = {name: value for name, value in fields.items() if value is not None}

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Return an integer from ``least`` to 2**31 − 1."""
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"config.json: `{name}` must be an integer, got {value!r:.200}.")
        if not least <= value < 2**31:
            raise InputError(f"config.json: `{name}` must be >= {least} and < 2**31, got {value!r:.200}.")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a finite number > 0."""
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"config.json: `{name}` must be a number, got {value!r:.200}.")
        if not 0 < value <= sys.float_info.max:
            raise InputError(f"config.json: `{name}` must be > 0 and finite, got {value!r:.200}.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value."""
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"config.json: `{name}` must be true or false, got {value!r:.200}.")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuse a value that would need other code; a missing field has the first of the allowed values."""
        value = self.fields.get(name, allowed[0])
        if value not in allowed:
            raise InputError(f"config.json: `{name}` must be one of {list(allowed)}, got {value!r:.200}.")

    def rope_theta(self, default: float) -> float:
        """Return the base of the rotary positions, which newer directories hold in ``rope_parameters``."""
        bases = {"rope_theta": self.number("rope_theta", default)} if "rope_theta" in self.fields else {}
        for name in ("rope_parameters", "rope_scaling"):
            rope = self.fields.get(name, {})
            if not isinstance(rope, dict):
                raise InputError(f"config.json: `{name}` must be an object, got {rope!r:.200}.")
            inner = FieldReader(rope)
            kinds = {kind: inner.fields.get(kind, "default") for kind in ("rope_type", "type")}
            if any(kind != "default" for kind in kinds.values()):
                raise InputError(f"config.json: `{name}`: only the default rotary positions are known: {rope!r:.200}.")
            if "rope_theta" in inner.fields:
                bases[f"{name}.rope_theta"] = inner.number("rope_theta", default)
        if len(set(bases.values())) > 1:
            raise InputError(f"config.json: `rope_theta` must be one number, got {bases}.")
        return next(iter(bases.values()), default)


def build_config(make: Callable[[], LoopedConfig]) -> LoopedConfig:
    """Return the config that ``make`` builds of fields that were read.

    Raises:
        InputError: If they contradict one another.

    Example:
        >>> build_config(lambda: LoopedConfig(vocab_size=11, max_positions=8, width=15, num_heads=2, ffn_width=32))
        Traceback (most recent call last):
        ...
        looplm.errors.InputError: config.json: `num_heads` must divide `width` (15), got 2.
    """
    try:
        return make()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config.json: {error}") from error
