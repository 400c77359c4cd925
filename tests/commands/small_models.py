"""Run directories of random models, made without training: one of sums whose answers change from depth to depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from looplm.checkpoints import save_checkpoint
from looplm.config import LoopedConfig
from looplm.corpora.text_tokenizer import TextTokenizer
from looplm.model import LoopedTransformer
from looplm.origin import Origin

SUMS: dict[str, Any] = {"min_digits": 2, "max_digits": 2}
_NUM_TOKENS = 17  # padding, ten digits, three signs, "=", the space, the end mark


def random_model(vocab_size: int, max_positions: int, **changes: Any) -> LoopedTransformer:
    torch.manual_seed(3)
    fields = {"width": 16, "num_heads": 2, "ffn_width": 24, "init_std": 0.5, **changes}
    return LoopedTransformer(LoopedConfig(vocab_size=vocab_size, max_positions=max_positions, **fields)).eval()


def _write_run(folder: Path, model: LoopedTransformer, data: dict[str, Any]) -> Path:
    save_checkpoint(model, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "data": data}), encoding="utf-8")
    return folder


def run_of_sums(folder: Path, **changes: Any) -> Path:
    """Write a run on two-digit additions; ``changes`` are fields of the model."""
    data = {"class_path": "looplm.ArithmeticDataModule", "init_args": SUMS}
    return _write_run(folder, random_model(_NUM_TOKENS, 16, **changes), data)


def run_of_texts(folder: Path, tokenizer: TextTokenizer, **arguments: Any) -> Path:
    """Write a run on questions in words; ``arguments`` are those of its MathDataModule."""
    model = random_model(tokenizer.vocab_size, 96)
    model.origin = Origin(config={}, files=tokenizer.files())
    given = {"class_path": f"looplm.corpora.any.{type(tokenizer).__name__}", "init_args": tokenizer.settings()}
    data = {"class_path": "looplm.MathDataModule", "init_args": {"tokenizer": given, **arguments}}
    return _write_run(folder, model, data)
