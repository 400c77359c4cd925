"""Muon for the matrices of the blocks and AdamW for the rest, as one optimiser; and what narrow weights lose of any.

Both update rules are PyTorch's; here they share a learning rate, a schedule and a checkpoint, and Muon does without
bfloat16 on a CPU and takes matrices apart that are several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonAdamW", "share_of_lost_updates"]

_FUSED = ("qkv", "qkv_proj", "Wqkv")
_TABLES = ("token_embedding", "position_embedding", "embed_tokens", "wte", "wpe", "head", "lm_head")


class _Muon(Muon):
    """PyTorch's Muon, but for the precision on a CPU, and for matrices that hold several.

    PyTorch's update is computed in bfloat16, whose products cost some thirty times float32's on a CPU that has none in
    hardware: more than the rest of a small model's step. On a CPU this one is computed in float32 or wider.
    """

    fused: tuple[str, ...] = ()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if param.grad is not None:
                    self._update(name, param, param.grad, group)
        return None

    def _update(self, name: str, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"])
        # Orthogonal as one, the queries' rows would share the singular values with those of keys and values.
        pieces = update.split(update.shape[1]) if set(name.split(".")) & set(self.fused) else (update,)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(torch.cat([_direction(piece, group) for piece in pieces]), alpha=-group["lr"])


def _direction(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """Return ``matrix`` orthogonalised, with root mean square 0.2, as is usual of AdamW's update."""
    orthogonal = _orthogonalize(matrix, group["ns_coefficients"], group["ns_steps"])
    return orthogonal * (0.2 * math.sqrt(max(matrix.shape)))


def _orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], num_steps: int) -> Tensor:
    """Return U p(S) Vᵀ of a matrix U S Vᵀ, ``p`` a quintic, iterated, that brings singular values near 1."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    precise = torch.promote_types(matrix.dtype, torch.float32)
    x = (matrix.mT if is_tall else matrix).to(precise if matrix.device.type == "cpu" else torch.bfloat16)
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = coefficients
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrix.dtype)


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
        fused: Parts of names of matrices that hold several, one below the other: Muon takes them in square pieces.
            `conf/math.yaml` learns faster so than with queries, keys and values as one matrix.
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
        fused: tuple[str, ...] = _FUSED,
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
        self._muon = _Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self._muon.fused = fused
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


@torch.no_grad()
def share_of_lost_updates(optimizer: Optimizer) -> float:
    """Return the share of the weights that are too large to be changed by an update as large as the learning rate.

    A weight w in [2ᵉ, 2ᵉ⁺¹) of a number type with precision eps moves in steps of ``eps · 2ᵉ``: less than half of one
    rounds to nothing. AdamW's and Muon's updates are about as large as the learning rate, most of them smaller.

    Args:
        optimizer: Its groups' ``initial_lr``, if a schedule has set one, else their ``lr``. Of sharded weights this
            process's part is looked at alone.

    Example:
        >>> weights = torch.full((4,), 0.02, dtype=torch.bfloat16)
        >>> [share_of_lost_updates(torch.optim.AdamW([weights], lr=lr)) for lr in (1e-6, 1e-3)]
        [1.0, 0.0]
    """
    num_lost = num_weights = 0
    for group in optimizer.param_groups:
        lr = float(group.get("initial_lr", group["lr"]))
        for param in group["params"]:
            weights = param.to_local() if isinstance(param, DTensor) else param
            exponent = weights.float().frexp().exponent - 1
            spacing = torch.finfo(weights.dtype).eps * torch.exp2(exponent)
            num_lost += int(((0.5 * spacing > lr) & (weights != 0)).sum())
            num_weights += weights.numel()
    return num_lost / max(num_weights, 1)
