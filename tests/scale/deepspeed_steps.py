"""Steps on DeepSpeed's own engine, without Lightning's strategy, which runs on GPUs only."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from processes import BASE
from torch import Tensor, nn

from looplm import ArithmeticDataModule, JacobianPenalty, LoopedConfig, LoopLM, STARSObjective, UniformDepth
from looplm.randomness import StepKey

SEED, STEPS = BASE["seed_everything"], BASE["trainer"]["max_steps"]


class _Step(nn.Module):
    """What Lightning hands to the engine: a module whose forward is the training step."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.data = ArithmeticDataModule(**BASE["data"]["init_args"], seed=SEED)
        sizes = {"vocab_size": self.data.vocab_size, "max_positions": self.data.max_positions}
        self.module = LoopLM(LoopedConfig(**sizes, **BASE["model"]["config"]), seed=SEED)
        self.objective = STARSObjective(
            depth_sampler=UniformDepth(1, 5),
            checkpoint_loops=2,
            penalty=JacobianPenalty(method=method),
            penalty_weight=0.2,
        )

    def forward(self, step: int, rank: int, num_ranks: int) -> Tensor:
        batches = [self.data.training_batch(step, optimizer_step=step, rank=i, world_size=num_ranks) for i in range(2)]
        labelled = torch.stack([(batch["labels"] != -100).sum() for batch in batches]).float().mean()
        key = StepKey(seed=SEED, micro_batch=step, optimizer_step=step, rank=rank)
        return self.objective(self.module.model, batches[rank], key, labelled).loss


def main(stage: int, method: str, output: str) -> int:
    """Train on two ranks; the first writes all weights, and whether the engine showed a gradient before the step."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, step = int(os.environ["RANK"]), _Step(method)
    config = {
        "train_micro_batch_size_per_gpu": BASE["data"]["init_args"]["batch_size"],
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": BASE["trainer"]["gradient_clip_val"],
    }
    optimizer = torch.optim.SGD(step.parameters(), lr=0.2, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=step, optimizer=optimizer, config=config)
    shows_gradients = False
    for number in range(STEPS):
        engine.backward(engine(number, rank, 2))
        shows_gradients |= any(parameter.grad is not None for parameter in step.parameters())
        engine.step()
    parameters = dict(step.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        if rank == 0:
            torch.save({name: parameter.detach().clone() for name, parameter in parameters.items()}, output)
    print(json.dumps({"shows_gradients": shows_gradients}))
    return 0
