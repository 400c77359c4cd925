"""The exits that ``exits`` measures and ``explore`` shows. Knows rules and thresholds; measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from looplm.exits import ConfidenceExit, EntropyExit, ExitRule, GateExit, KLExit, ResidualExit
from looplm.model import LoopedTransformer

__all__ = ["EXITS", "NamedExit", "exits_of"]


@dataclass(frozen=True, kw_only=True)
class NamedExit:
    """An exit rule with the thresholds that are worth a try.

    Example:
        >>> kl = NamedExit(name="kl", make=KLExit, tried=(0.1, 0.01), shown=0.01, condition="KL(p‖p′) ≤ {:g}")
        >>> kl.make(kl.shown).needs_logits, kl.condition.format(kl.shown)
        (True, 'KL(p‖p′) ≤ 0.01')
    """

    name: str
    """In tables, files and on the page."""
    make: Callable[[float], ExitRule]
    """Makes the rule of a threshold."""
    tried: tuple[float, ...]
    """Thresholds that ``exits`` measures, from the most loops saved to the fewest."""
    shown: float
    """The threshold of ``explore``'s page; as README's measurement has it."""
    condition: str
    """When a token stops, ``{:g}`` for the threshold."""


_TOLERANCES = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)
EXITS = (
    NamedExit(name="residual", make=ResidualExit, tried=_TOLERANCES, shown=0.05, condition="‖h−h′‖/‖h‖ ≤ {:g}"),
    NamedExit(
        name="kl",
        make=KLExit,
        tried=(0.5, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4),
        shown=1e-3,
        condition="KL(p‖p′) ≤ {:g}",
    ),
    NamedExit(
        name="entropy",
        make=EntropyExit,
        tried=(1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 3e-3),
        shown=0.02,
        condition="entropy ≤ {:g}",
    ),
    NamedExit(
        name="confidence",
        make=ConfidenceExit,
        tried=(0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.997, 0.999),
        shown=0.997,
        condition="probability ≥ {:g}",
    ),
    NamedExit(
        name="gate", make=GateExit, tried=(0.3, 0.5, 0.7, 0.9, 0.95, 0.99), shown=0.9, condition="gate's share ≥ {:g}"
    ),
)
"""All of them."""


def exits_of(model: LoopedTransformer) -> list[NamedExit]:
    """Return the exits that a model can take: one that reads the learned gate needs a model with a gate.

    Example:
        >>> from looplm.config import LoopedConfig
        >>> model = LoopedTransformer(LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32))
        >>> [known.name for known in exits_of(model)]
        ['residual', 'kl', 'entropy', 'confidence']
    """
    return [known for known in EXITS if model.exit_gate is not None or not known.make(known.shown).needs_gate]
