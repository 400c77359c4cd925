"""Does another fixed-point solver at test time mend a model that loses its answers with depth?

No training. Plain iteration is held against damping, ``h ↦ β h + (1 − β) Φ(h)``, which maps each eigenvalue μ of the
Jacobian to ``β + (1 − β) μ``, and against Anderson acceleration over the last five iterates. All have the same fixed
points. Prints exact match by the number of times Φ was applied. Use:

    python tests/benchmarks/solvers_at_test_time.py RUN_DIRECTORY ...
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from looplm.checkpoints import load_checkpoint
from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.model import LoopedTransformer
from looplm.scoring import predictions_at_depths

DEPTHS = [2, 4, 8, 16, 32, 64, 128, 256]


class Damped:
    """A looped model whose steps are damped."""

    def __init__(self, model: LoopedTransformer, damping: float) -> None:
        self.embed, self.decode = model.embed, model.decode
        self.model, self.damping = model, damping

    def step(self, state):
        following = self.model.step(state)
        return replace(following, hidden=torch.lerp(following.hidden, state.hidden, self.damping))


class Anderson:
    """A looped model whose steps are Anderson's: the mixture of the last Φ(h) whose residuals cancel best."""

    def __init__(self, model: LoopedTransformer, memory: int = 5, ridge: float = 1e-6) -> None:
        self.decode, self.model, self.memory, self.ridge = model.decode, model, memory, ridge

    def embed(self, *arguments):
        self.history = []
        return self.model.embed(*arguments)

    def step(self, state):
        following = self.model.step(state)
        self.history = [*self.history, (state.hidden.flatten(1), following.hidden.flatten(1))][-self.memory :]
        before, after = (torch.stack(part, dim=1) for part in zip(*self.history, strict=True))  # (B, m, n)
        residuals = after - before
        gram = residuals @ residuals.mT
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
        gram = gram / scale + self.ridge * torch.eye(len(self.history))
        weights = torch.linalg.solve(gram, torch.ones(*gram.shape[:2], 1))
        weights = weights / weights.sum(1, keepdim=True)
        return replace(following, hidden=(weights * after).sum(1).view_as(following.hidden))


def main(folders: list[str]) -> None:
    print("run, solver, " + ", ".join(f"depth {depth}" for depth in DEPTHS))
    for folder in map(Path, folders):
        model = load_checkpoint(folder / "checkpoints" / "last.ckpt")
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
        digits = (settings["min_digits"], settings["max_digits"])
        data = ArithmeticDataModule(operations=settings["operations"], min_digits=digits[0], max_digits=digits[1])
        test = data.held_out("test", 400, *digits)
        solvers = {"plain": model, **{f"damped {b}": Damped(model, b) for b in (0.25, 0.5, 0.75)}}
        for name, solver in {**solvers, "anderson 5": Anderson(model)}.items():
            preds = predictions_at_depths(solver, test["input_ids"], DEPTHS, test["attention_mask"])
            right = ((preds == test["labels"]) | (test["labels"] == -100)).all(-1).float().mean(1)
            print(f"{folder.name}, {name}, " + ", ".join(f"{100 * value:.1f}" for value in right.tolist()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
