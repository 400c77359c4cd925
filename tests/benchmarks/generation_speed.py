"""What the cache and the batch are worth when text is generated."""

from __future__ import annotations

import torch

from looplm.config import LoopedConfig
from looplm.generation import generate
from looplm.model import LoopedTransformer

from .timing import Row, ratio_of, timed

__all__ = ["generation_rows"]

NUM_ROWS, NUM_LOOPS, NEW_TOKENS = 32, 8, 64


def generation_rows(num_rounds: int) -> list[Row]:
    """Tokens by second of a batch with a cache over those of a row alone without; the tokens must be equal."""
    torch.manual_seed(0)
    size = {"vocab_size": 256, "max_positions": 96, "width": 256, "num_heads": 4, "ffn_width": 512}
    config = LoopedConfig(**size, positions="rotary", tie_embeddings=False, init_std=0.05, dropout=0.0)
    model = LoopedTransformer(config).eval()
    prompts = torch.randint(256, (NUM_ROWS, 16))
    options = {"num_loops": NUM_LOOPS, "max_new_tokens": NEW_TOKENS, "end_id": -1}
    generate(model, prompts[:2], **{**options, "max_new_tokens": 2})  # warm up
    alone, batched = [], []
    for row in range(max(num_rounds // 4, 3)):
        seconds, tokens = timed(lambda: generate(model, prompts, **options))
        batched.append(seconds)
        seconds, one = timed(lambda row=row: generate(model, prompts[row : row + 1], **options, cache="none"))
        alone.append(seconds)
        assert torch.equal(one[0], tokens[row]), f"row {row} differs when it is alone"
    measured = ratio_of([NUM_ROWS * seconds for seconds in alone], batched)
    what = f"generation of {NUM_ROWS} rows with a cache, {NEW_TOKENS} tokens, {NUM_LOOPS} loops, width 256"
    return [Row(what, "a row at a time without", measured, 20.0, "at least", "x faster")]
