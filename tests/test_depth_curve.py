"""The curve of a trained model: what it costs, and that it says what decoding one problem at a time says."""

import statistics
import time
from pathlib import Path

import pytest
import torch

from looplm.cli import main
from looplm.config import LoopedConfig
from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.generation import generate
from looplm.loop import unroll
from looplm.metrics import DepthExactMatch
from looplm.model import LoopedTransformer
from looplm.scoring import predictions_at_depths

DEPTHS = list(range(0, 101, 2))

TRAINING = """
trainer:
  max_steps: 500
  enable_progress_bar: false
  limit_val_batches: 0
model:
  config: {width: 48, num_heads: 2, ffn_width: 96, dropout: 0.0, init_std: 0.05}
  objective:
    depth_sampler: {class_path: LogNormalDepth, init_args: {mu: 1.4, sigma: 0.4, min_depth: 1, max_depth: 12}}
  lr_schedule: {warmup_steps: 50}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.002}}
data:
  class_path: ArithmeticDataModule
  init_args: {min_digits: 2, max_digits: 2, batch_size: 128}
"""


@pytest.mark.slow
def test_the_curve_equals_greedy_decoding_of_one_problem_at_a_time(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(TRAINING)
    assert main(["fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    model = LoopedTransformer(LoopedConfig.from_dict(checkpoint["hyper_parameters"]["config"])).eval()
    model.load_state_dict({name.removeprefix("model."): x for name, x in checkpoint["state_dict"].items()})

    data = ArithmeticDataModule(min_digits=2, max_digits=2)
    problems = data.held_out("test", 100, 2, 2)
    inputs, labels = problems["input_ids"], problems["labels"]
    preds = predictions_at_depths(model, inputs, DEPTHS, problems["attention_mask"])
    in_one_pass = ((preds == labels) | (labels == -100)).all(-1)

    one_by_one = torch.zeros_like(in_one_pass)
    for row in range(len(labels)):
        asked = labels[row] != -100
        prompt, target = inputs[row, : int(asked.long().argmax()) + 1], labels[row][asked]
        for k, depth in enumerate(DEPTHS):
            answer = generate(model, prompt[None], num_loops=depth, max_new_tokens=len(target), end_id=data.end_id)[0]
            one_by_one[k, row] = torch.equal(answer, target)
    accuracy = in_one_pass.float().mean(1)
    assert 0.05 < accuracy.max()
    assert accuracy.min() < 0.95  # a model that is all right or all wrong would show little
    assert torch.equal(in_one_pass, one_by_one)


@pytest.mark.slow
def test_the_curve_costs_its_bare_loops_and_decodes() -> None:
    torch.manual_seed(0)
    model = LoopedTransformer(
        LoopedConfig(vocab_size=17, max_positions=16, width=128, num_heads=4, ffn_width=256, dropout=0.0)
    ).eval()
    data = ArithmeticDataModule(min_digits=3, max_digits=3).held_out("test", 1000, 3, 3)
    batches = [{name: column[start : start + 250] for name, column in data.items()} for start in range(0, 1000, 250)]

    def curve() -> None:
        metric = DepthExactMatch(len(DEPTHS))
        for batch in batches:
            preds = predictions_at_depths(model, batch["input_ids"], DEPTHS, batch["attention_mask"])
            metric.update(preds, batch["labels"], batch["index"])
        metric.compute()

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            state = model.embed(batch["input_ids"], batch["attention_mask"])
            *_, last = unroll(model, state, 100)
            for _ in DEPTHS:
                model.decode(last)

    ratios = []
    for _ in range(5):
        times = []
        for work in (curve, bare):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    assert statistics.median(ratios) <= 1.2, ratios
