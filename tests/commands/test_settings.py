"""What loggers are told: the same scalars each, and the settings of the run once."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tiny_run import TINY, merge

from looplm.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation, dynamics and two loggers."""
    folder = tmp_path_factory.mktemp("logged")
    loggers = [
        {"class_path": name, "init_args": {"save_dir": str(folder / name), "name": "", "version": "", **extra}}
        for name, extra in (("TensorBoardLogger", {"default_hp_metric": False}), ("CSVLogger", {}))
    ]
    monitor = {"class_path": "LatentDynamicsMonitor", "init_args": {"depths": [1, 4]}}
    options = {"trainer.logger": loggers, "trainer.callbacks": [monitor], "trainer.default_root_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(merge(TINY, options)))
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def events(run: Path) -> Any:
    accumulator = EventAccumulator(str(run / "TensorBoardLogger"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_logger_gets_the_same_scalars(run: Path, events: Any) -> None:
    rows = _rows(run / "CSVLogger" / "metrics.csv")
    for tag in (tags := set(events.Tags()["scalars"])):
        logged = {event.step: event.value for event in events.Scalars(tag)}
        written = {int(row["step"]): float(row[tag]) for row in rows if row[tag]}
        assert written == pytest.approx(logged), tag
    assert tags == rows[0].keys() - {"step"}
    assert {"train/loss", "val/exact_match/depth_00004", "val/dynamics/residual/depth_00004"} <= tags


def test_no_scalar_is_one_that_nobody_measured(events: Any) -> None:
    assert [tag for tag in events.Tags()["scalars"] if "hp_metric" in tag] == []
    assert (
        min(event.step for event in events.Scalars("val/exact_match/depth_00004")) == 1
    )  # the second step; steps count from 0


def test_the_hparams_tab_has_settings_beside_accuracies(events: Any) -> None:
    def content(tag: str) -> Any:
        data = plugin_data_pb2.HParamsPluginData()
        data.ParseFromString(events.SummaryMetadata(tag).plugin_data.content)
        return data

    session = content("_hparams_/session_start_info").session_start_info
    assert session.hparams["model.config.width"].number_value == 16
    assert session.hparams["model.objective.depth_sampler.init_args.max_depth"].number_value == 4
    assert session.hparams["model.objective.penalty"].string_value == "none"
    experiment = content("_hparams_/experiment").experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == [
        f"val/exact_match/{name}" for name in ("peak", "escapes", "depth_00001", "depth_00004")
    ]
    assert {metric.name.tag for metric in experiment.metric_infos} <= set(events.Tags()["scalars"])


def test_other_loggers_get_the_same_settings(run: Path) -> None:
    written = yaml.safe_load((run / "CSVLogger" / "hparams.yaml").read_text())
    assert written == yaml.safe_load((run / "TensorBoardLogger" / "hparams.yaml").read_text())
    assert written["model.config.width"] == 16


def test_an_evaluation_afterwards_takes_no_step_back(run: Path, events: Any) -> None:
    # TensorBoard's server would drop the points of training that are not before it.
    before = {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    evaluated = ["--config", str(run / "config.yaml"), f"--ckpt_path={next(run.rglob('last.ckpt'))}"]
    assert main(["validate", *evaluated]) == 0
    assert main(["test", *evaluated]) == 0
    accumulator = EventAccumulator(str(run / "TensorBoardLogger"), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    for tag in tags["scalars"]:
        steps = [event.step for event in accumulator.Scalars(tag)]
        assert steps == sorted(steps), tag
    assert accumulator.Scalars("test/exact_match/depth_00008")[0].step == TINY["trainer"]["max_steps"]
    assert len(accumulator.Scalars("val/exact_match/depth_00004")) == before["val/exact_match/depth_00004"] + 1
    assert len(accumulator.Scalars("epoch")) == before["epoch"]
    for tag in tags["images"]:
        assert accumulator.Images(tag)[-1].step == TINY["trainer"]["max_steps"], tag


def test_a_run_with_another_logger_has_everything_in_its_directory(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    root = tmp_path / "run"
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs")}}
    config = write_config(trainer__default_root_dir=str(root), trainer__logger=logger)
    assert main(["fit", "--config", str(config)]) == 0
    assert {"config.yaml", "checkpoints", "val_curve.csv", "val_curve.png"} <= {path.name for path in root.iterdir()}
    assert main(["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.max_steps", "6"]) == 0
    assert main(["test", "--config", str(root / "config.yaml")]) == 0
    assert (root / "test_curve.csv").is_file()
    steps = [row["step"] for row in _rows(tmp_path / "logs" / "lightning_logs" / "version_1" / "metrics.csv")]
    assert min(map(int, steps)) == 4  # it went on, where a run from the start would begin at 0
