"""Which families there are, and which of them a config.json or a config of ours belongs to."""

from __future__ import annotations

from typing import Any

from looplm.config import LoopedConfig
from looplm.errors import InputError
from looplm.families.family import Family
from looplm.families.huginn import Huginn
from looplm.families.ouro import Ouro

__all__ = ["FAMILIES", "family_named", "family_of"]

FAMILIES: tuple[Family, ...] = (Ouro(), Huginn())
"""All families but our own, whose tensors have our names."""


def family_named(model_type: Any) -> Family:
    """Return the family of a config.json's ``model_type``.

    Raises:
        InputError: If it is unknown.

    Example:
        >>> family_named("huginn_raven").loops_field
        'mean_recurrence'
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ["looplm", *(family.model_type for family in FAMILIES)]
    raise InputError(f"config.json: `model_type` must be one of {known}, got {model_type!r:.200}.")


def family_of(config: LoopedConfig) -> Family | None:
    """Return the family that a config of ours belongs to, or None.

    Example:
        >>> family_of(LoopedConfig.ouro_1_4b()).model_type
        'ouro'
        >>> family_of(LoopedConfig.stars_addition(vocab_size=17, max_positions=16)) is None
        True
    """
    return next((family for family in FAMILIES if family.fits(config)), None)
