"""Two ranks: collectives of one sharded STARS step at several depths, printed by rank 0 as JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from looplm import FixedDepth, JacobianPenalty, LoopedConfig, LoopedTransformer, STARSObjective
from looplm.parallel import shard_looped
from looplm.randomness import StepKey


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LoopedTransformer(
            LoopedConfig(vocab_size=12, max_positions=8, width=16, num_heads=2, ffn_width=16, dropout=0.0)
        )

    def training_step(self, batch: dict[str, Tensor], depth: int) -> Tensor:
        penalty = JacobianPenalty(method="finite_difference")
        objective = STARSObjective(depth_sampler=FixedDepth(depth), penalty=penalty, penalty_weight=0.1)
        return objective(self.model, batch, StepKey(seed=0, micro_batch=0, optimizer_step=0, rank=0)).loss


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    root = Root()
    shard_looped(root, [], mesh)
    tokens = torch.randint(1, 12, (4, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    counts = {}
    for depth in (2, 8):
        with Collectives() as seen:
            root.training_step({"input_ids": tokens, "labels": tokens}, depth).backward()
        counts[depth] = seen.counts
        root.zero_grad()
    if dist.get_rank() == 0:
        print(json.dumps(counts))
    dist.destroy_process_group()
