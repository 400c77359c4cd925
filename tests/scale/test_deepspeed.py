"""DeepSpeed's engine on two CPU processes takes our steps; skipped without the package or a C++ compiler."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from deepspeed_steps import main
from forks import ROOT, run_ranks
from lightning.pytorch.strategies import DeepSpeedStrategy
from test_strategies import STEPS, largest_difference, reference

from looplm import ArithmeticDataModule

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs deepspeed (pip install deepspeed) and a C++ compiler",
)


@pytest.mark.parametrize(
    ("stage", "method"), [(2, "finite_difference"), (2, "jvp"), (2, "vjp"), (3, "finite_difference")]
)
def test_zero_gives_the_weights_of_one_process(tmp_path: Path, stage: int, method: Any) -> None:
    said = run_ranks(main, stage, method, str(tmp_path / "weights.pt"), num_ranks=2)
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    # Without truncated backpropagation: what has no gradient in a step stands still elsewhere; ZeRO gives it zeros, and
    # its momentum moves it on.
    expected = reference(2, 1, method, backprop_loops=None)[STEPS]
    assert largest_difference(found, {name: expected[name] for name in found}) <= 1e-5
    # What NonFiniteGuard reckons with: it stops such a run by its losses, before the step.
    assert said.count('{"shows_gradients": false}') == 2


def test_lightning_makes_its_config_of_ours_without_asking_the_stream_for_a_batch_sampler() -> None:
    overlay = yaml.safe_load((ROOT / "conf" / "overlays" / "deepspeed.yaml").read_text())
    strategy = DeepSpeedStrategy(**overlay["trainer"]["strategy"]["init_args"])
    data = ArithmeticDataModule(batch_size=2)
    source = SimpleNamespace(instance=data, dataloader=data.train_dataloader, is_defined=lambda: True)
    trainer: Any = SimpleNamespace(
        fit_loop=SimpleNamespace(_data_source=source), accumulate_grad_batches=2, gradient_clip_val=0.5
    )
    trainer.lightning_module = SimpleNamespace(trainer=trainer)
    strategy._lightning_module = trainer.lightning_module
    strategy._format_batch_size_and_grad_accum_config()
    assert isinstance(strategy.config, dict)
    assert strategy.config["gradient_accumulation_steps"] == 2
    assert strategy.config["gradient_clipping"] == 0.5
    assert strategy.config["zero_optimization"]["stage"] == 2
