"""Somebody's tiny recursive puzzle solver with two states.

Lines marked ``# +`` were added to measure and steady its loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from looplm import DepthAccuracyCurve, JacobianPenalty, LatentDynamicsMonitor, LoopState, predictions_at_depths  # +

NUM_CELLS, NUM_SYMBOLS, BLANK = 8, 4, 0


def make_puzzles(num: int, seed: int) -> TensorDataset:
    """Two rows, each a permutation of four symbols, with one symbol of each row blanked."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(num, 2, NUM_SYMBOLS, generator=draw).argsort(-1) + 1
    blanks = torch.randint(NUM_SYMBOLS, (num, 2, 1), generator=draw)
    return TensorDataset(rows.scatter(2, blanks, BLANK).flatten(1), rows.flatten(1))


class PuzzleSolver(L.LightningModule):
    """One small network refines a latent thought a few times, then the answer; and all of that again."""

    def __init__(self, width: int = 12, num_thoughts: int = 2, num_rounds: int = 3) -> None:
        super().__init__()
        self.num_thoughts, self.num_rounds = num_thoughts, num_rounds
        self.symbols = nn.Embedding(NUM_SYMBOLS + 1, width)
        self.cells = nn.Parameter(0.1 * torch.randn(NUM_CELLS, width))
        self.start = nn.Parameter(0.1 * torch.randn(2, width))
        self.across = nn.Sequential(nn.Linear(NUM_CELLS, 2 * NUM_CELLS), nn.GELU(), nn.Linear(2 * NUM_CELLS, NUM_CELLS))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, NUM_SYMBOLS + 1)

    def network(self, h: Tensor) -> Tensor:
        h = self.norm(h + self.across(h.transpose(1, 2)).transpose(1, 2))
        return self.norm(h + self.within(h))

    def think(self, carry: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        answer, thought = carry["answer"], carry["thought"]
        for _ in range(self.num_thoughts):
            thought = self.network(x + answer + thought)
        return {"answer": self.network(answer + thought), "thought": thought}

    def encode(self, puzzle: Tensor) -> Tensor:
        return self.symbols(puzzle) + self.cells

    def empty_carry(self, num: int) -> dict[str, Tensor]:
        answer, thought = self.start.expand(num, NUM_CELLS, -1, -1).unbind(2)
        return {"answer": answer, "thought": thought}

    def embed(self, inputs: Tensor, attention_mask: Any = None, initial_hidden: Any = None) -> LoopState:  # +
        return LoopState(self.empty_carry(len(inputs)), {"x": self.encode(inputs)})  # +

    def step(self, state: LoopState) -> LoopState:  # +
        return state.advance(self.think(state.hidden, state.context["x"]))  # +

    def decode(self, state: LoopState) -> Tensor:  # +
        return self.head(state.hidden["answer"])  # +

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        puzzle, solution = batch
        x, carry = self.encode(puzzle), self.empty_carry(len(puzzle))
        loss = torch.zeros(())
        for _ in range(self.num_rounds):
            carry = self.think({name: part.detach() for name, part in carry.items()}, x)
            loss = loss + F.cross_entropy(self.head(carry["answer"]).flatten(0, 1), solution.flatten())
        loss += 0.1 * JacobianPenalty()(lambda h: self.think(h, x), carry, carry, None, torch.default_generator)  # +
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        puzzle, solution = batch
        x, carry = self.encode(puzzle), self.empty_carry(len(puzzle))
        for _ in range(self.num_rounds):
            carry = self.think(carry, x)
        self.log("val_cells", (self.head(carry["answer"]).argmax(-1) == solution).float().mean())
        return {"depths": [1, 16], "depth_preds": predictions_at_depths(self, puzzle, [1, 16]), "labels": solution}  # +

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def run(folder: Path, max_steps: int = 6) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    callbacks: list[L.Callback] = []
    callbacks += [DepthAccuracyCurve(), LatentDynamicsMonitor([1, 16], inputs_fn=lambda batch: (batch[0], None))]  # +
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train, val = DataLoader(make_puzzles(96, 0), batch_size=16), DataLoader(make_puzzles(32, 1), batch_size=16)
    trainer.fit(PuzzleSolver(), train, val)
    return trainer
