"""A term of the loss that makes the residual tell when a token is done.

Takes states and what is right in them; knows no model, no loss and no training.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["SettlingPenalty"]

_TINY = 1e-8


class SettlingPenalty:
    """Tokens that are right stand still, tokens that are not keep moving: what ``ResidualExit`` reads becomes true.

    Random depths alone let a token that has its answer go on moving, and let one that waits for what others find out
    stand still before it is right. With ``r_s = ‖h_s − h_{s−1}‖ / ‖h_s‖`` of a labelled token, the loss is the mean of
    ``r_s`` over tokens and loops where the token is right at ``s − 1`` and stays so, and the mean of ``max(margin −
    r_s, 0)`` over those where it is wrong at s or later: two means, since the second kind is rare and is what an exit
    errs by. Gradients go into the trajectory. The paper's ``‖h_t − h_{t−1}‖`` of the last step
    (:class:`~looplm.stability.penalty.LastStepPenalty`) hurries every token instead.

    Args:
        margin: The least residual of a token that is not right yet.

    Raises:
        ValueError: If the margin is negative.

    Example:
        >>> import torch
        >>> still, moving = torch.ones(3, 1, 4), torch.tensor([1.0, 2.0, 4.0])[:, None, None].expand(3, 1, 4)
        >>> right, wrong = torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.bool)
        >>> cases = [(still, right), (still, wrong), (moving, right), (moving, wrong)]
        >>> [round(SettlingPenalty(margin=0.4)(*case).item(), 2) for case in cases]
        [0.0, 0.4, 0.5, 0.0]
    """

    def __init__(self, margin: float = 0.4) -> None:
        if margin < 0:
            raise ValueError(f"`margin` must be >= 0, got {margin}.")
        self.margin = margin

    def __call__(self, trajectory: Tensor, is_right: Tensor) -> Tensor:
        """Return the penalty, a scalar; 0 without tokens.

        Args:
            trajectory: States of N labelled tokens after two or more consecutive loops, ``(S, N, D)``.
            is_right: Whether the likeliest token there is the label, bool ``(S, N)``.
        """
        stays_right = is_right.flip(0).cummin(0).values.flip(0)
        states = trajectory.float()
        # The length has no gradient at zero.
        length = (states.diff(dim=0).square().sum(-1) + _TINY).sqrt()
        residual = length / states[1:].detach().norm(dim=-1).clamp_min(_TINY)
        still = _mean(residual, stays_right[:-1])
        return still + _mean((self.margin - residual).clamp_min(0), ~stays_right[1:])


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of the values where a mask is True; 0 where it never is."""
    return (values * where).sum() / where.sum().clamp_min(1)
