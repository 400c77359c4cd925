"""Steps that are not finite change nothing, are counted, and end the run when there are too many in a row."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader

from looplm import NonFiniteGuard
from looplm.errors import InputError

BAD = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:.*is skipped.*")


class Line(L.LightningModule):
    """Fits y = w·x; a batch of NaN gives a loss and a gradient of NaN, one above 9 an infinite loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("train/depth", 7.0)
        self.seen.append(self.weight.item())
        loss = (self.weight * batch).square().mean()
        return loss + torch.tensor(float("inf")) if batch.max() > 9 else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


def _fit(folder: Path, values: list[float], guard: NonFiniteGuard, **options: Any) -> Line:
    module = Line()
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[guard], enable_checkpointing=False, **settings, **options
    )
    trainer.fit(module, DataLoader(torch.tensor(values)[:, None], batch_size=1))
    return module


@pytest.mark.parametrize("bad", [BAD, float("inf"), 10.0], ids=["nan", "inf", "loss-alone"])
def test_bad_step_changes_nothing_and_is_counted(tmp_path: Path, bad: float) -> None:
    guard = NonFiniteGuard(max_in_a_row=2)
    module = _fit(tmp_path, [1.0, bad, 1.0, bad, 1.0], guard)
    undisturbed = _fit(tmp_path, [1.0, 1.0, 1.0], NonFiniteGuard())
    assert torch.equal(module.weight, undisturbed.weight)  # neither weight decay nor momentum moved in between
    assert (guard.skipped_steps, guard.in_a_row) == (2, 0)
    assert float(module.trainer.callback_metrics["train/skipped_steps"]) == 2.0


def test_one_bad_micro_batch_skips_the_whole_step(tmp_path: Path) -> None:
    guard = NonFiniteGuard()
    module = _fit(tmp_path, [1.0, 1.0, BAD, 1.0, 1.0, 1.0], guard, accumulate_grad_batches=2)
    undisturbed = _fit(tmp_path, [1.0] * 4, NonFiniteGuard(), accumulate_grad_batches=2)
    assert torch.equal(module.weight, undisturbed.weight)
    assert guard.skipped_steps == 1


def test_run_stops_with_step_depth_checkpoint_and_batch(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"3 step\(s\) in a row, the last of them step 5 \(depth 7\): the run stops"
    ) as e:
        _fit(tmp_path, [1.0, 2.0, 3.0, BAD, BAD, float("inf"), 1.0], NonFiniteGuard(max_in_a_row=3))
    folder = tmp_path / "non_finite"
    assert str(folder) in str(e.value)
    kept = torch.load(folder / "before.ckpt", weights_only=True)
    before = _fit(tmp_path, [1.0, 2.0, 3.0], NonFiniteGuard())
    assert torch.equal(kept["state_dict"]["weight"], before.weight)
    (state,) = [value for name, value in kept["callbacks"].items() if "NonFiniteGuard" in name]
    assert state == {"skipped_steps": 3, "in_a_row": 0}  # who goes on from there may meet three more
    (batch,) = torch.load(folder / "batches_rank_0.pt", weights_only=True)
    assert torch.equal(batch, torch.tensor([[float("inf")]]))


class _Keeping(DeepSpeedStrategy):
    """As a run sees it: gradients are not to be had. The real one needs a GPU."""

    def __init__(self) -> None:
        pass

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision


@pytest.mark.parametrize("loss", [1.0, BAD])
def test_with_deepspeed_the_run_stops_before_the_step_that_it_cannot_skip(tmp_path: Path, loss: float) -> None:
    saved: list[Path] = []
    trainer: Any = SimpleNamespace(
        strategy=_Keeping(),
        global_step=4,
        global_rank=0,
        callback_metrics={},
        default_root_dir=tmp_path,
        save_checkpoint=lambda path, weights_only: saved.append(path),
    )
    guard, module = NonFiniteGuard(), Line()
    guard.on_train_batch_start(trainer, module, torch.ones(1), 4)
    guard.on_before_backward(trainer, module, torch.tensor(loss))
    step = partial(guard.on_before_optimizer_step, trainer, module, torch.optim.SGD(module.parameters(), lr=0.1))
    if loss == 1.0:
        step()
        assert saved == []
        return
    with pytest.raises(InputError, match=r"1 step\(s\) in a row, the last of them step 4: the run stops"):
        step()
    assert saved == [tmp_path / "non_finite" / "before.ckpt"]
    assert (tmp_path / "non_finite" / "batches_rank_0.pt").exists()


def test_counts_survive_a_resume() -> None:
    first, second = NonFiniteGuard(), NonFiniteGuard()
    first.skipped_steps, first.in_a_row = 5, 2
    second.load_state_dict(first.state_dict())
    assert (second.skipped_steps, second.in_a_row) == (5, 2)


def test_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="`max_in_a_row` must be >= 1, got 0"):
        NonFiniteGuard(0)
