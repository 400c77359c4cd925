"""The recipe of conf/stars_plus.yaml against the paper's, at the same depths: what a training step costs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import looplm
from looplm.config import LoopedConfig
from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.model import LoopedTransformer
from looplm.objective import STARSObjective
from looplm.randomness import StepKey

CONF = Path(looplm.__file__).parents[1] / "conf"
NUM_STEPS = 40


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / name).read_text(encoding="utf-8"))["model"]


def _objective(values: dict[str, Any]) -> STARSObjective:
    parser = ArgumentParser()
    parser.add_class_arguments(STARSObjective, "objective")
    return parser.instantiate_classes(parser.parse_object({"objective": values})).objective


@pytest.mark.slow
def test_a_step_costs_at_most_that_of_the_papers_recipe_at_the_same_depths(capsys: pytest.CaptureFixture[str]) -> None:
    ours, stars, papers = _read("stars_plus.yaml"), _read("stars.yaml"), _read("paper/addition_stars.yaml")
    data = ArithmeticDataModule(min_digits=3, max_digits=3, batch_size=128)
    last_stage = ours["objective"]["depth_sampler"]["init_args"]["stages"][-1]["sampler"]
    recipes = {
        "ours": (ours["config"], _objective(ours["objective"])),
        # The authors' loss, gradient through all loops and every sequence penalised, at our width and depths.
        "paper": (stars["config"], _objective({**papers["objective"], "depth_sampler": last_stage})),
    }
    assert recipes["ours"][1].depth_sampler.mean == recipes["paper"][1].depth_sampler.mean
    models, times = {}, {name: [] for name in recipes}
    for name, (config, _) in recipes.items():
        torch.manual_seed(0)
        models[name] = LoopedTransformer(
            LoopedConfig(vocab_size=data.vocab_size, max_positions=data.max_positions, **config)
        )
    for step in range(NUM_STEPS + 3):
        batch = data.training_batch(step)
        # Far behind every start: both penalties and the last stage of the depths are in force, the depths are equal.
        key = StepKey(seed=0, micro_batch=step, optimizer_step=100_000)
        for name, (_, objective) in recipes.items():
            start = time.perf_counter()
            objective(models[name], batch, key).loss.backward()
            times[name].append(time.perf_counter() - start)
    # The mean, not the median: what a run costs is the sum over its depths. The first steps warm up.
    ratio = statistics.mean(times["ours"][3:]) / statistics.mean(times["paper"][3:])
    with capsys.disabled():  # the number of the README
        print(f"\na step of stars_plus costs {ratio:.2f} × one of the paper's recipe at the same depths")
    assert ratio <= 1.15
