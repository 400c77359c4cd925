"""Corpora and tokenizers for the tests of maths data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from sums import CHAT_TEMPLATE, ROWS, write_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

datasets.disable_progress_bars()


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """One hundred short sums."""
    return write_lines(tmp_path / "sums.jsonl", ROWS)


@pytest.fixture(scope="session")
def save_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a directory as `transformers` does; its tokenizer knows some English."""

    def save(name: str = "chat", chat_template: str | None = CHAT_TEMPLATE, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("tokenizers") / name
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = [text for row in ROWS for text in row.values()]
        tokenizer.train_from_iterator([*texts, *["and Ann has 2\n\n\n\n"] * 50], trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|endoftext|>", **changes})
        fast.chat_template = chat_template
        fast.save_pretrained(folder)
        return folder

    return save
