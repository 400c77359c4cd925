"""Linear maps with known spectra, and small transformers: what estimators are judged against."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from looplm.config import LoopedConfig
from looplm.loop import LoopState
from looplm.model import LoopedTransformer
from looplm.stability.vectors import StepFn

RHO = 0.9
PLACEMENTS = ["pre_norm", "post_norm", "sandwich_branch", "sandwich_dual"]
NORMS = ["layer_norm", "rms_norm", "simple_norm"]
LENGTH, WIDTH = 4, 6
MASKS = {
    "unpadded": None,
    "left": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, draw: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def uniform(*shape: int, draw: torch.Generator) -> Tensor:
    return 2 * torch.rand(shape, generator=draw, dtype=torch.float64) - 1


def _turned(matrix: Tensor, draw: torch.Generator) -> Tensor:
    """The same map in another orthonormal basis."""
    basis = torch.linalg.qr(normal(*matrix.shape, draw=draw))[0]
    return basis @ matrix @ basis.T


def _rotation(radius: float, angle: float) -> Tensor:
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return radius * torch.tensor(turn, dtype=torch.float64)


def normal_map(size: int, seed: int) -> Tensor:
    """Symmetric, the second eigenvalue at 0.8 of the first."""
    draw = generator(seed)
    values = 0.8 * RHO * uniform(size, draw=draw)
    values[:2] = torch.tensor([RHO, -0.8 * RHO])
    return _turned(torch.diag(values), draw)


def complex_pair(size: int, seed: int, condition: float = 10.0) -> Tensor:
    """A leading complex pair, in a basis whose condition number is ``condition``: growth oscillates."""
    draw = generator(seed)
    radii, angles = 0.8 * RHO * torch.rand(size // 2, generator=draw), math.pi * torch.rand(size // 2, generator=draw)
    radii[0] = RHO
    blocks = torch.block_diag(*(_rotation(float(r), float(a)) for r, a in zip(radii, angles, strict=True)))
    stretch = torch.logspace(0, math.log10(condition), size, dtype=torch.float64)[torch.randperm(size, generator=draw)]
    return _turned(stretch[:, None] * _turned(blocks, draw) / stretch, draw)


def defective(size: int, seed: int, block: int = 3) -> Tensor:
    """A leading Jordan block: growth tends to its limit like 1/k."""
    draw = generator(seed)
    matrix = torch.diag(0.7 * RHO * uniform(size, draw=draw))
    matrix[:block, :block] = RHO * torch.eye(block) + torch.diag(torch.ones(block - 1), 1)
    return _turned(matrix, draw)


def non_normal(size: int, seed: int, coupling: float = 3.0) -> Tensor:
    """Triangular with large entries: the norm is many times the spectral radius."""
    draw = generator(seed)
    values = 0.8 * RHO * uniform(size, draw=draw)
    values[0] = RHO
    values = values[torch.randperm(size, generator=draw)]
    matrix = torch.diag(values) + coupling * torch.triu(normal(size, size, draw=draw), 1) / size**0.5
    return _turned(matrix, draw)


MAPS = {
    "normal": normal_map,
    "complex_pair": complex_pair,
    "jordan_2": lambda size, seed: defective(size, seed, 2),
    "jordan_3": defective,
    "non_normal": non_normal,
}


def apply(matrix: Tensor) -> StepFn:
    return lambda h: h @ matrix.T


def transformer(
    norm_placement: str, norm_type: str = "layer_norm", mask: Tensor | None = None, **changes: object
) -> tuple[LoopedTransformer, LoopState]:
    """A tiny float64 model and its state after two loops, three sequences."""
    torch.manual_seed(0)
    config = LoopedConfig.from_dict(
        {
            "vocab_size": 7,
            "max_positions": LENGTH,
            "width": WIDTH,
            "num_heads": 2,
            "ffn_width": 10,
            "norm_placement": norm_placement,
            "norm_type": norm_type,
            "init_std": 0.5,
            "dropout": 0.0,
        }
        | changes
    )
    model = LoopedTransformer(config).double()
    tokens = torch.randint(7, (3, LENGTH), generator=generator(1))
    with torch.no_grad():
        return model, model.step(model.step(model.embed(tokens, mask)))


def dense_jacobians(step_fn: StepFn, hidden: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """J of each sequence, restricted to its real positions, in reverse mode and row by row."""
    # Sequences do not interact, so the sum over the batch keeps every sequence's own Jacobian apart.
    full = torch.autograd.functional.jacobian(lambda h: step_fn(h).sum(0), hidden)
    size = hidden[0].numel()
    blocks = full.movedim(hidden.ndim - 1, 0).reshape(len(hidden), size, size)
    if mask is None:
        return list(blocks)
    rows = [row.repeat_interleave(size // len(row)).bool() for row in mask]
    return [block[row][:, row] for block, row in zip(blocks, rows, strict=True)]


every_block = list(itertools.product(PLACEMENTS, NORMS))
