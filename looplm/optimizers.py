"""Muon for the matrices of the blocks and AdamW for the rest, as one optimiser.

Both update rules are PyTorch's; here they only share a learning rate, a schedule and a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonAdamW"]

_TABLES = ("token_embedding", "position_embedding", "embed_tokens", "wte", "wpe", "head", "lm_head")


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) on two-dimensional weights, AdamW on tables, heads, norms and biases.

    Muon's update is scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982, eq. 4), so that one
    learning rate and one weight decay serve both. Small looped models learn in less than half as many steps as with
    AdamW alone: see `conf/math.yaml`.

    Args:
        params: ``model.named_parameters()``: the names tell tables and heads from the matrices of the blocks.
        lr: Learning rate of both.
        weight_decay: Decoupled, of both.
        momentum: Muon's, with Nesterov's correction.
        betas: AdamW's.
        tables: Parts of names that are no matrix of a block: they get AdamW.

    Raises:
        ValueError: If the parameters come without names or none is a matrix of a block, or a number is out of range.

    Example:
        >>> block = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 8), "lm_head": torch.nn.Linear(8, 16)})
        >>> optimizer = MuonAdamW(block.named_parameters(), lr=0.004)
        >>> [group["param_names"] for group in optimizer.param_groups]
        [['up.weight'], ['up.bias', 'lm_head.weight', 'lm_head.bias']]
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        lr: float = 4e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        tables: tuple[str, ...] = _TABLES,
    ) -> None:
        named = list(params)
        if any(isinstance(item, Tensor) or isinstance(item, dict) for item in named):
            raise ValueError("`params` must be `model.named_parameters()`, got parameters without names.")

        def is_matrix(name: str, param: Tensor) -> bool:
            return param.ndim == 2 and not set(name.split(".")) & set(tables)

        matrices = [(name, param) for name, param in named if is_matrix(name, param)]
        others = [(name, param) for name, param in named if not is_matrix(name, param)]
        if not matrices:
            raise ValueError("`params` must hold a two-dimensional weight of a block, got none: AdamW alone would do.")
        self._muon = Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, fused=True) if others else None
        groups = [*self._muon.param_groups, *(self._adamw.param_groups if self._adamw else [])]
        super().__init__(groups, {})
        self._share()
        self.register_load_state_dict_post_hook(_share_again)  # loading makes new groups and state

    def _share(self) -> None:
        """Let both read and write this optimiser's groups and state."""
        self._muon.param_groups, self._muon.state = self.param_groups[:1], self.state
        if self._adamw is not None:
            self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        if self._adamw is not None:
            self._adamw.step()
        return loss


def _share_again(optimizer: Optimizer) -> None:
    assert isinstance(optimizer, MuonAdamW)
    optimizer._share()
