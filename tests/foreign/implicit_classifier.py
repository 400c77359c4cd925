"""Somebody's deep-equilibrium classifier of small images.

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

NUM_CLASSES, NUM_ITERATIONS = 3, 8


def make_images(num: int, seed: int) -> TensorDataset:
    """Bars: horizontal, vertical or diagonal, with noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num,), generator=draw)
    bars = torch.zeros(NUM_CLASSES, 6, 6)
    bars[0, 2:4], bars[1, :, 2:4], bars[2] = 1.0, 1.0, torch.eye(6)
    return TensorDataset(bars[labels, None] + 0.3 * torch.randn(num, 1, 6, 6, generator=draw), labels)


class ImplicitClassifier(L.LightningModule):
    """``z* = tanh(norm(conv(z*) + x))``, solved by iteration; the class is read from ``z*``."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.head = nn.Linear(width * 36, NUM_CLASSES)

    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.mix(z) + x))

    def solve(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(images)
        z = torch.zeros_like(x)
        for _ in range(NUM_ITERATIONS):
            z = self.cell(z, x)
        return z, x

    def embed(self, inputs: Tensor, attention_mask: Any = None, initial_hidden: Any = None) -> LoopState:  # +
        return LoopState(torch.zeros_like(x := self.encoder(inputs)), {"x": x})  # +

    def step(self, state: LoopState) -> LoopState:  # +
        return state.advance(self.cell(state.hidden, state.context["x"]))  # +

    def decode(self, state: LoopState) -> Tensor:  # +
        return self.head(state.hidden.flatten(1))  # +

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        z, x = self.solve(images)
        loss = F.cross_entropy(self.head(z.flatten(1)), labels)
        loss += 0.1 * JacobianPenalty()(lambda h: self.cell(h, x), z, z, None, torch.default_generator)  # +
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        z, _ = self.solve(images)
        self.log("val_loss", F.cross_entropy(self.head(z.flatten(1)), labels))
        return {"depths": [1, 16], "depth_preds": predictions_at_depths(self, images, [1, 16]), "labels": labels}  # +

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def run(folder: Path, max_steps: int = 6) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    callbacks: list[L.Callback] = []
    callbacks += [DepthAccuracyCurve(), LatentDynamicsMonitor([1, 16], inputs_fn=lambda b: (b[0], None))]  # +
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
    train, val = DataLoader(make_images(96, 0), batch_size=16), DataLoader(make_images(32, 1), batch_size=16)
    trainer.fit(ImplicitClassifier(), train, val)
    return trainer
