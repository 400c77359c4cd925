"""What is said of stable and of unstable loops, and how often."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from looplm import LatentDynamicsMonitor, LoopState, StabilityWarning
from looplm.callbacks.stability_warning import stability_problems


class Scaled(L.LightningModule):
    """``h ↦ rate · h``: every quantity is the rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def embed(self, inputs: Tensor, attention_mask: Any = None, initial_hidden: Any = None) -> LoopState:
        return LoopState(inputs)

    def step(self, state: LoopState) -> LoopState:
        return state.advance(self.rate * state.hidden)

    def decode(self, state: LoopState) -> Tensor:
        return state.hidden

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 0 * self.rate

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _loader() -> DataLoader[Tensor]:
    return DataLoader([torch.ones(3)] * 2, batch_size=2)


def _trainer(folder: Path, *callbacks: L.Callback) -> L.Trainer:
    monitor = LatentDynamicsMonitor(
        [1, 3],
        inputs_fn=lambda batch: (batch, None),
        num_products=4,
        num_samples=0,
        num_iterations=0,
        with_figures=False,
    )
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        callbacks=[*callbacks, monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _said(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "not stable" in str(warning.message)]


def test_an_unstable_loop_is_named_once_in_plain_words(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, StabilityWarning())
    model = Scaled(1.5)
    (said,) = _said(lambda: (trainer.fit(model, _loader(), _loader()), trainer.test(model, _loader(), verbose=False)))
    assert "val, step 1" in said
    assert "the spectral radius is 1.5, above 1, at depth 3, the deepest evaluated" in said
    assert "JacobianPenalty" in said


@pytest.mark.parametrize("how", ["validate", "test"])
def test_it_also_speaks_outside_of_training(tmp_path: Path, how: str) -> None:
    trainer = _trainer(tmp_path, StabilityWarning())
    assert len(_said(lambda: getattr(trainer, how)(Scaled(1.5), _loader(), verbose=False))) == 1


def test_a_stable_loop_is_not_named(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, StabilityWarning())
    assert _said(lambda: trainer.fit(Scaled(0.5), _loader(), _loader())) == []


def test_a_higher_limit_and_a_later_start_are_kept(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, StabilityWarning(max_radius=2.0))
    assert _said(lambda: trainer.fit(Scaled(1.5), _loader(), _loader())) == []
    trainer = _trainer(tmp_path, StabilityWarning(start_step=3))
    (said,) = _said(lambda: trainer.fit(Scaled(1.5), _loader(), _loader()))
    assert "val, step 3" in said


def test_without_a_monitor_there_is_nothing_to_read(tmp_path: Path) -> None:
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[StabilityWarning()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(ValueError, match="reads what LatentDynamicsMonitor logs: add one to the callbacks"):
        trainer.validate(Scaled(0.5), _loader(), verbose=False)


@pytest.mark.parametrize(
    ("residuals", "radii", "words"),
    [
        ({1: 0.5, 8: 0.1, 64: 0.01}, {1: 3.0, 64: 0.99}, []),  # only the deepest radius counts
        ({1: 0.5, 8: 0.1, 64: 0.01}, {1: 0.5, 64: 1.01}, ["spectral radius is 1.01"]),
        ({1: 0.5, 8: 0.1, 64: 0.3}, {64: 0.9}, ["from 0.1 at depth 8 to 0.3 at depth 64"]),
        ({1: 0.5, 8: 0.1, 64: 0.3}, {64: 1.2}, ["spectral radius is 1.2", "residual grows"]),
        ({1: 0.5, 8: 0.1, 64: 0.14}, {64: 0.9}, []),  # within the allowance
        ({1: 1e-7, 8: 9e-7, 64: 3e-6}, {64: 0.9}, []),  # rounding
        ({1: 0.5, 8: float("nan")}, {8: float("nan")}, ["spectral radius is nan", "to nan at depth 8"]),
        ({8: 0.5}, {}, []),
        ({}, {}, []),
    ],
)
def test_problems_are_what_speaks_against_larger_depths(
    residuals: dict[int, float], radii: dict[int, float], words: list[str]
) -> None:
    found = stability_problems(residuals, radii)
    assert len(found) == len(words)
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence


@pytest.mark.parametrize("options", [{"max_radius": 0.0}, {"growth": 0.5}, {"tolerance": -1.0}, {"start_step": -1}])
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`max_radius` must be > 0"):
        StabilityWarning(**options)
