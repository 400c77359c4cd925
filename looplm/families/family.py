"""What a family of published checkpoints is: its config fields and its tensors, as parts of ours.

Knows configs and names; reads and writes no file and holds no weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from looplm.config import LoopedConfig

__all__ = ["Family", "ForeignTensor", "Part", "whole"]


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` of one of our tensors.

    Example:
        >>> Part("core.0.attention.query.weight", 0, 16).stop
        16
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a published checkpoint: ``parts`` one below the other, in another ``shape``.

    Example:
        >>> ForeignTensor("model.norm.weight", (16,), (Part("final_norm.weight", 0, 16),)).shape
        (16,)
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def whole(theirs: str, ours: str, *shape: int) -> ForeignTensor:
    """Return a tensor of a published checkpoint that is all of one of ours.

    Example:
        >>> whole("model.norm.weight", "final_norm.weight", 16).parts
        (Part(name='final_norm.weight', start=0, stop=16),)
    """
    return ForeignTensor(theirs, shape, (Part(ours, 0, shape[0]),))


class Family(ABC):
    """How one kind of checkpoint describes itself and names its tensors.

    Example:
        >>> from looplm.families.known import family_named
        >>> family_named("ouro").loops_field
        'total_ut_steps'
    """

    model_type: str
    """The ``model_type`` of its config.json."""
    loops_field: str
    """The field that holds the usual number of loops."""

    @abstractmethod
    def read_config(self, fields: Mapping[str, Any]) -> LoopedConfig:
        """Return our config of a config.json.

        Raises:
            InputError: If a field is missing or asks for what the family's description does not cover.
        """

    @abstractmethod
    def write_config(self, config: LoopedConfig, num_loops: int) -> dict[str, Any]:
        """Return the fields of config.json."""

    @abstractmethod
    def tensors(self, config: LoopedConfig) -> list[ForeignTensor]:
        """Return all tensors that hold weights; those of our own that no part names do not exist."""

    def fits(self, config: LoopedConfig) -> bool:
        """Return whether a config of ours is one of this family, whatever it says of training."""
        try:
            again = self.read_config(self.write_config(config, 1))
        except ValueError:
            return False
        return replace(config, dropout=again.dropout, init_std=again.init_std) == again
