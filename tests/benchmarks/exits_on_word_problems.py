"""What exits save where tokens differ in the loops they need: a model of word problems, answers graded.

No training. Prints accuracy by mean loops of a generated token, for fixed depths and for the residual, KL and
confidence exits at several thresholds, on the test sources of a run of ``conf/math.yaml``. Use:

    python -m tests.benchmarks.exits_on_word_problems RUN_DIRECTORY
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule

import looplm.corpora.bpe
import looplm.corpora.mathematics  # noqa: F401 - the config names their classes
from looplm import ConfidenceExit, ExitRule, GenerationOptions, KLExit, ResidualExit, generate_with_loops
from looplm.checkpoints import load_checkpoint
from looplm.commands.run_data import read_run_data
from looplm.corpora.grading import grade

NUM_LOOPS = 12
RULES: dict[str, tuple[Callable[[float], ExitRule], tuple[float, ...]]] = {
    "residual": (ResidualExit, (0.5, 0.3, 0.2, 0.1, 0.05)),
    "kl": (KLExit, (0.1, 0.03, 0.01, 0.003, 0.001)),
    "confidence": (ConfidenceExit, (0.9, 0.97, 0.99, 0.997)),
}


def read_data(run: Path) -> Any:
    data = read_run_data(run / "config.yaml")
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    config = parser.parse_object({"data": {"class_path": data.class_name, "init_args": data.arguments}})
    return parser.instantiate_classes(config).data


def main(run: Path) -> None:
    data = read_data(run)
    data.eval_batch_size = 10_000
    data.prepare_data()
    data.setup("test")
    model = load_checkpoint(run / "checkpoints" / "last.ckpt").eval()
    for loader in data.test_dataloader():
        (batch,) = loader

        def measure(name: str, num_loops: int, rule: ExitRule | None, batch: dict[str, Any] = batch) -> None:
            options = GenerationOptions(num_loops=num_loops, max_new_tokens=64, end_id=batch["end_id"], exit_rule=rule)
            with torch.inference_mode():
                result = generate_with_loops(model, batch["prompt_ids"], options, batch["prompt_mask"])
            rows = [list(takewhile(lambda token: token != batch["end_id"], row)) for row in result.tokens.tolist()]
            right = [
                grade(data.tokenizer.decode(row), final).is_right
                for row, final in zip(rows, batch["final"], strict=True)
            ]
            share = 100 * sum(right) / len(right)
            sys.stdout.write(f"{batch['source']:>12}  {name:<24} {share:5.1f} %  {result.mean_loops:5.2f} loops\n")

        for depth in (1, 2, 3, 4, 6, 8):
            measure(f"fixed {depth}", depth, None)
        for name, (make, thresholds) in RULES.items():
            for threshold in thresholds:
                measure(f"{name} {threshold:g}", NUM_LOOPS, make(threshold))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
