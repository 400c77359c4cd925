"""Progress where there is no terminal: whole lines, few of them, with what a bar would show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from looplm.callbacks.progress_lines import ProgressLines
from looplm.cli import main


class Line(L.LightningModule):
    """Fits a line; logs one value for the bar and one that is not for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.layer(batch) - batch).square().mean()
        self.log("loss_shown", loss, prog_bar=True)
        self.log("hidden", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.layer(batch)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _lines(capsys: pytest.CaptureFixture[str], tmp_path: Path, every_seconds: float, **options: object) -> list[str]:
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[ProgressLines(every_seconds)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    capsys.readouterr()
    trainer.fit(Line(), DataLoader(torch.ones(12, 1), batch_size=2))
    return capsys.readouterr().out.splitlines()


def test_a_line_a_step_where_there_is_no_wait(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = _lines(capsys, tmp_path, 0.0, max_steps=4)
    assert [re.match(r"step (\d+) of 4, [\d.e+]+ steps/s", line)[1] for line in lines] == ["1", "2", "3", "4"]
    assert all("loss_shown" in line and "hidden" not in line for line in lines)
    assert ["left" in line for line in lines] == [True, True, True, False]


def test_first_and_last_step_alone_in_a_short_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = _lines(capsys, tmp_path, 3600.0, max_epochs=2)
    assert [line.split(",")[0] for line in lines] == ["step 1 of 12", "step 12 of 12"]


def test_evaluations_say_how_far_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loaders = [DataLoader(torch.ones(4, 1), batch_size=2), DataLoader(torch.ones(3, 1), batch_size=2)]
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[ProgressLines(0.0)],
        logger=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    for evaluate, name in ((trainer.validate, "validation"), (trainer.test, "test")):
        capsys.readouterr()
        evaluate(Line(), loaders, verbose=False)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
        assert lines == [f"{name}: batch {done} of 4" for done in (1, 2, 3, 4)]


def test_negative_wait_is_refused() -> None:
    with pytest.raises(ValueError, match="`every_seconds` must be >= 0, got -1"):
        ProgressLines(-1)


@pytest.mark.parametrize("callbacks", [[], [{"class_path": "LearningRateMonitor"}]])
def test_fit_writes_lines_whatever_other_callbacks_it_has(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    write_config: Callable[..., Path],
    callbacks: list[dict[str, str]],
) -> None:
    config = write_config(
        trainer__default_root_dir=str(tmp_path), trainer__enable_progress_bar=True, trainer__callbacks=callbacks
    )
    assert main(["fit", "--config", str(config)]) == 0
    assert re.search(r"^step 1 of \d+, ", capsys.readouterr().out, re.MULTILINE)
