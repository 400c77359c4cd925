"""Does damping at test time alone mend a model that loses its answers with depth?

Replaces Φ by ``h ↦ β h + (1 − β) Φ(h)``, which has the same fixed points and maps each eigenvalue μ of the Jacobian to
``β + (1 − β) μ``, and prints exact match by depth for several β. No training. Use:

    python tests/benchmarks/damped_iteration.py RUN_DIRECTORY ...
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from looplm.checkpoints import load_checkpoint
from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.generation import predictions_at_depths
from looplm.model import LoopedTransformer

DEPTHS = [2, 4, 8, 16, 32, 64, 128, 256]


class Damped:
    """A looped model whose steps are damped."""

    def __init__(self, model: LoopedTransformer, damping: float) -> None:
        self.embed, self.decode = model.embed, model.decode
        self.model, self.damping = model, damping

    def step(self, state):
        following = self.model.step(state)
        return replace(following, hidden=torch.lerp(following.hidden, state.hidden, self.damping))


def main(folders: list[str]) -> None:
    print("run, damping, " + ", ".join(f"depth {depth}" for depth in DEPTHS))
    for folder in map(Path, folders):
        model = load_checkpoint(folder / "checkpoints" / "last.ckpt")
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
        digits = (settings["min_digits"], settings["max_digits"])
        data = ArithmeticDataModule(operations=settings["operations"], min_digits=digits[0], max_digits=digits[1])
        test = data.held_out("test", 400, *digits)
        for damping in (0.0, 0.25, 0.5, 0.75):
            preds = predictions_at_depths(Damped(model, damping), test["input_ids"], DEPTHS, test["attention_mask"])
            right = ((preds == test["labels"]) | (test["labels"] == -100)).all(-1).float().mean(1)
            print(f"{folder.name}, {damping}, " + ", ".join(f"{100 * value:.1f}" for value in right.tolist()))


if __name__ == "__main__":
    main(sys.argv[1:])
