"""Somebody's recurrent-depth language model with a random initial state, in the manner of Huginn.

Lines marked ``# +`` were added to measure and steady its loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from looplm import DepthAccuracyCurve, JacobianPenalty, LatentDynamicsMonitor, LoopState, predictions_at_depths  # +

VOCABULARY, LENGTH, PAD = 11, 9, 0


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences that count upwards from 1 to 10 and round again, of several lengths, padded on the right."""

    def __init__(self, num: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(10, (num,), generator=draw)
        self.lengths = torch.randint(4, LENGTH + 1, (num,), generator=draw)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (self.starts[index] + torch.arange(LENGTH + 1)) % 10 + 1
        real = torch.arange(LENGTH) < self.lengths[index]
        return {
            "input_ids": tokens[:-1].masked_fill(~real, PAD),
            "attention_mask": real.long(),
            "labels": tokens[1:].masked_fill(~real, -100),
        }


class RandomStateLM(L.LightningModule):
    """Prelude, core with an adapter that joins state and embedding, coda; the state starts as noise."""

    def __init__(self, width: int = 16, num_heads: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.adapter = nn.Linear(2 * width, width)
        self.prelude, self.core, self.coda = (
            nn.TransformerEncoderLayer(width, num_heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.core_norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def block(self, layer: nn.Module, h: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1], device=h.device)
        return layer(h, src_mask=mask, is_causal=True)

    def encode(self, ids: Tensor) -> Tensor:
        return self.block(self.prelude, self.tokens(ids) + self.positions.weight[: ids.shape[1]])

    def noise(self, embedded: Tensor) -> Tensor:
        return 0.4 * torch.randn_like(embedded)

    def iterate(self, h: Tensor, embedded: Tensor) -> Tensor:
        return self.core_norm(self.block(self.core, self.adapter(torch.cat([h, embedded], -1))))

    def predict_logits(self, h: Tensor) -> Tensor:
        return self.head(self.block(self.coda, h))

    def embed(self, inputs: Tensor, attention_mask: Any = None, initial_hidden: Any = None) -> LoopState:  # +
        return LoopState(self.noise(e := self.encode(inputs)), {"e": e, "attention_mask": attention_mask})  # +

    def step(self, state: LoopState) -> LoopState:  # +
        return state.advance(self.iterate(state.hidden, state.context["e"]))  # +

    def decode(self, state: LoopState) -> Tensor:  # +
        return self.predict_logits(state.hidden)  # +

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        e, real = self.encode(batch["input_ids"]), batch["attention_mask"]
        h = self.noise(e)
        for _ in range(int(torch.randint(2, 7, ()))):
            h = self.iterate(h, e)
        losses = F.cross_entropy(self.predict_logits(h).transpose(1, 2), batch["labels"], reduction="none")
        loss = losses.sum() / real.sum()
        loss += 0.1 * JacobianPenalty()(lambda s: self.iterate(s, e), h, h, real, torch.default_generator)  # +
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        ids, labels = batch["input_ids"], batch["labels"]
        e = self.encode(ids)
        h = self.noise(e)
        for _ in range(4):
            h = self.iterate(h, e)
        self.log("val_loss", F.cross_entropy(self.predict_logits(h).flatten(0, 1), labels.flatten()))
        return {"depths": [1, 16], "depth_preds": predictions_at_depths(self, ids, [1, 16]), "labels": labels}  # +

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def run(folder: Path, max_steps: int = 6) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    callbacks: list[L.Callback] = []
    callbacks += [DepthAccuracyCurve(), LatentDynamicsMonitor([1, 16])]  # +
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
    train, val = DataLoader(Counting(96, 0), batch_size=16), DataLoader(Counting(32, 1), batch_size=16)
    trainer.fit(RandomStateLM(), train, val)
    return trainer
