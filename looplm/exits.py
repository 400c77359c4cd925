"""When a token may stop looping: rules that read its state, its logits or a learned gate after each loop.

Knows tensors of the tokens that are being computed; no model, no cache and no decoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ConfidenceExit",
    "EntropyExit",
    "ExitRule",
    "GateExit",
    "KLExit",
    "LoopSignals",
    "ResidualExit",
    "exit_distribution",
]


def exit_distribution(gates: Tensor) -> Tensor:
    """Return the probability to stop after each loop, from a gate's probability to stop there.

    ``p_t = λ_t Π_{s<t} (1 − λ_s)``, and the last loop takes what is left (Ouro).

    Args:
        gates: λ, ``(…, T)``, in [0, 1]; the last has no effect.

    Returns:
        p, ``(…, T)``, which sums to 1.

    Example:
        >>> exit_distribution(torch.tensor([0.5, 0.5, 0.1])).tolist()
        [0.5, 0.25, 0.25]
    """
    stay = torch.cumprod(1 - gates[..., :-1], dim=-1)
    reach = torch.cat([torch.ones_like(gates[..., :1]), stay], dim=-1)
    return torch.cat([gates[..., :-1] * reach[..., :-1], reach[..., -1:]], dim=-1)


@dataclass(frozen=True, kw_only=True)
class LoopSignals:
    """What a rule sees of R tokens after a loop; what no rule asked for is None.

    Example:
        >>> h = torch.zeros(2, 4)  # two tokens of width 4
        >>> LoopSignals(depth=1, previous=h, hidden=h).logits is None
        True
    """

    depth: int
    """Loops they have run."""
    previous: Tensor
    """Their states before the loop, ``(R, D)``."""
    hidden: Tensor
    """Their states now, ``(R, D)``."""
    logits: Tensor | None = None
    """Their logits now, ``(R, V)``."""
    previous_logits: Tensor | None = None
    """Their logits one loop ago, ``(R, V)``; None after the first loop."""
    survival: Tensor | None = None
    """``Π_{s≤t} (1 − λ_s)`` of the learned gate, ``(R,)``, at least in float32."""


class ExitRule(ABC):
    """Says which tokens may stop.

    A rule that needs neither logits nor a gate is asked of every token of a prompt, which stops where all may; others
    are asked of its last token.

    Args:
        min_loops: No token stops before that many loops.

    Example:
        >>> class EvenDepthExit(ExitRule):
        ...     def __call__(self, signals):
        ...         return torch.full(signals.hidden.shape[:1], signals.depth % 2 == 0)
        >>> h = torch.zeros(3, 4)  # three tokens of width 4
        >>> EvenDepthExit()(LoopSignals(depth=2, previous=h, hidden=h))
        tensor([True, True, True])
    """

    needs_logits = False
    """Whether the rule reads logits: a coda and a head for every loop."""
    needs_gate = False
    """Whether it reads the model's learned gate."""

    def __init__(self, min_loops: int = 1) -> None:
        if min_loops < 1:
            raise ValueError(f"`min_loops` must be >= 1, got {min_loops}.")
        self.min_loops = min_loops

    @abstractmethod
    def __call__(self, signals: LoopSignals) -> Tensor:
        """Return which of the R tokens stop now, bool ``(R,)``."""


class ResidualExit(ExitRule):
    """Stop where ``‖h_t − h_{t−1}‖ / ‖h_t‖`` is at most ``tolerance``: the state has reached its fixed point.

    Args:
        tolerance: Largest residual, > 0.
        min_loops: No token stops before that many loops.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> rule = ResidualExit(0.1)
        >>> rule(LoopSignals(depth=2, previous=torch.tensor([[1.0], [2.0]]), hidden=torch.tensor([[1.05], [1.0]])))
        tensor([ True, False])
    """

    def __init__(self, tolerance: float, min_loops: int = 1) -> None:
        super().__init__(min_loops)
        if not tolerance > 0:
            raise ValueError(f"`tolerance` must be > 0, got {tolerance}.")
        self.tolerance = tolerance

    def __call__(self, signals: LoopSignals) -> Tensor:
        """See :meth:`ExitRule.__call__`."""
        now = signals.hidden.float()
        has_settled: Tensor = (now - signals.previous.float()).norm(dim=-1) <= self.tolerance * now.norm(dim=-1)
        return has_settled


class KLExit(ExitRule):
    """Stop where ``KL(p_t ‖ p_{t−1})`` of consecutive next-token distributions is at most ``threshold`` nats (Huginn).

    Args:
        threshold: Largest divergence, > 0.
        min_loops: No token stops before that many loops; never before the second.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> logits = torch.zeros(1, 3)
        >>> h = torch.zeros(1, 2)
        >>> KLExit(1e-3)(LoopSignals(depth=2, previous=h, hidden=h, logits=logits, previous_logits=logits))
        tensor([True])
    """

    needs_logits = True

    def __init__(self, threshold: float, min_loops: int = 1) -> None:
        super().__init__(min_loops)
        if not threshold > 0:
            raise ValueError(f"`threshold` must be > 0, got {threshold}.")
        self.threshold = threshold

    def __call__(self, signals: LoopSignals) -> Tensor:
        """See :meth:`ExitRule.__call__`."""
        logits = _given(signals.logits)
        if signals.previous_logits is None:
            return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        now, before = logits.float().log_softmax(-1), signals.previous_logits.float().log_softmax(-1)
        return (now.exp() * (now - before)).sum(-1) <= self.threshold


class EntropyExit(ExitRule):
    """Stop where the entropy of the next-token distribution is at most ``threshold`` nats.

    Args:
        threshold: Largest entropy, > 0.
        min_loops: No token stops before that many loops.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> h = torch.zeros(2, 1)
        >>> logits = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
        >>> EntropyExit(0.1)(LoopSignals(depth=1, previous=h, hidden=h, logits=logits))
        tensor([False,  True])
    """

    needs_logits = True

    def __init__(self, threshold: float, min_loops: int = 1) -> None:
        super().__init__(min_loops)
        if not threshold > 0:
            raise ValueError(f"`threshold` must be > 0, got {threshold}.")
        self.threshold = threshold

    def __call__(self, signals: LoopSignals) -> Tensor:
        """See :meth:`ExitRule.__call__`."""
        log_p = _given(signals.logits).float().log_softmax(-1)
        # A probability of zero has no entropy, whatever its logarithm.
        return -torch.where(log_p.isinf(), 0.0, log_p.exp() * log_p).sum(-1) <= self.threshold


class ConfidenceExit(ExitRule):
    """Stop where the most likely next token has at least the probability ``threshold``.

    Args:
        threshold: In (0, 1].
        min_loops: No token stops before that many loops.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> h = torch.zeros(2, 1)
        >>> logits = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
        >>> ConfidenceExit(0.9)(LoopSignals(depth=1, previous=h, hidden=h, logits=logits))
        tensor([False,  True])
    """

    needs_logits = True

    def __init__(self, threshold: float, min_loops: int = 1) -> None:
        super().__init__(min_loops)
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` must be in (0, 1], got {threshold}.")
        self.threshold = threshold

    def __call__(self, signals: LoopSignals) -> Tensor:
        """See :meth:`ExitRule.__call__`."""
        return _given(signals.logits).float().softmax(-1).amax(-1) >= self.threshold


class GateExit(ExitRule):
    """Stop where the learned gate's probability to have stopped, ``p_1 + … + p_t``, is at least ``quantile`` (Ouro).

    A quantile of 1 stops nothing that has any probability left to go on.

    Args:
        quantile: In (0, 1].
        min_loops: No token stops before that many loops.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> h = torch.zeros(2, 1)
        >>> GateExit(0.5)(LoopSignals(depth=1, previous=h, hidden=h, survival=torch.tensor([0.6, 0.4])))
        tensor([False,  True])
    """

    needs_gate = True

    def __init__(self, quantile: float, min_loops: int = 1) -> None:
        super().__init__(min_loops)
        if not 0 < quantile <= 1:
            raise ValueError(f"`quantile` must be in (0, 1], got {quantile}.")
        self.quantile = quantile

    def __call__(self, signals: LoopSignals) -> Tensor:
        """See :meth:`ExitRule.__call__`."""
        # Not `1 - survival >= quantile`: small survivals round to 1 there, and a quantile of 1 means all loops.
        return _given(signals.survival) <= 1 - self.quantile


def _given(signal: Tensor | None) -> Tensor:
    assert signal is not None, "the rule says what it needs"
    return signal
