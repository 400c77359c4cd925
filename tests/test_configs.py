"""Every shipped config trains, validates and tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import looplm
from looplm.cli import main

CONF = Path(looplm.__file__).parents[1] / "conf"


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


OVERLAYS = CONF / "overlays"
STRATEGIES = [OVERLAYS / f"{name}.yaml" for name in ("ddp", "deepspeed", "fsdp")]
MATHS = {*CONF.glob("*math*.yaml"), *CONF.glob("eval/*.yaml")}  # see test_math_configs.py
# What needs several processes is run in tests/scale.
CONFIGS = sorted(set(CONF.rglob("*.yaml")) - set(STRATEGIES) - MATHS)
# A file that is no whole run is an overlay: on any run in conf/overlays, else on the base.yaml beside it.
WHOLE = [path for path in CONFIGS if {"trainer", "model", "data"} <= _read(path).keys()]


def _name(path: Path) -> str:
    return str(path.relative_to(CONF))


def _base(path: Path) -> Path:
    return CONF / "stars.yaml" if path.parent == OVERLAYS else path.with_name("base.yaml")


def _merged(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], overlay[key])
        for key in base.keys() & overlay.keys()
        if isinstance(base[key], dict) and isinstance(overlay[key], dict)
    }
    return {**base, **overlay, **both}


def test_there_are_whole_configs() -> None:
    assert CONF / "stars.yaml" in WHOLE


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_config_trains_a_step_and_validates(path: Path, tmp_path: Path) -> None:
    # One step at a small size: what is tested is that every key exists and every object can be built.
    files = [path] if path in WHOLE else [_base(path), path]
    argv = [argument for file in files for argument in ("--config", str(file))]
    argv += [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    argv += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    argv += ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=null"]
    argv += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--trainer.num_sanity_val_steps=0"]
    argv += ["--data.batch_size=2", "--data.eval_batch_size=2", "--data.num_val=2"]
    argv += ["--model.val_depths=[1,2]", "--model.test_depths=[0,3]"]
    if path not in WHOLE:
        argv.append("--trainer.callbacks=null")  # they are the base's, whose own test runs them
    if "test_file" in _read(files[0])["data"]["init_args"]:
        # Shipped data is named relative to the repository, where the configs are run.
        argv.append(f"--data.test_file={CONF.parent / _read(files[0])['data']['init_args']['test_file']}")
    assert main(["fit", *argv]) == 0
    assert (tmp_path / "val_curve.csv").is_file()
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]["config"]
    wanted = _merged(_read(files[0]), _read(path))["model"]["config"]
    assert wanted.items() <= saved.items()
    if path in WHOLE:
        assert main(["test", *argv]) == 0
        assert (tmp_path / "test_curve.csv").is_file()


@pytest.mark.parametrize("path", WHOLE, ids=_name)
def test_whole_config_names_its_own_run_directory(path: Path) -> None:
    folders = [_read(other)["trainer"]["default_root_dir"] for other in WHOLE]
    # Two runs in one directory would overwrite each other.
    assert folders.count(_read(path)["trainer"]["default_root_dir"]) == 1


@pytest.mark.parametrize("path", STRATEGIES, ids=_name)
def test_strategy_can_be_laid_over_a_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fit", "--config", str(CONF / "stars_plus.yaml"), "--config", str(path), "--print_config"]
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]
    strategy, wanted = printed["strategy"], _read(path)["trainer"]["strategy"]
    if isinstance(wanted, dict):
        assert strategy["class_path"].rsplit(".", 1)[-1] == wanted["class_path"]
        assert wanted["init_args"].items() <= strategy["init_args"].items()
    else:
        assert strategy == wanted
    assert printed["max_steps"] == _read(CONF / "stars_plus.yaml")["trainer"]["max_steps"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it trains")
def test_deepspeed_without_gpu_is_one_clear_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configs = [CONF / "stars.yaml", OVERLAYS / "deepspeed.yaml"]
    argv = [argument for file in configs for argument in ("--config", str(file))]
    assert main(["fit", *argv, f"--trainer.default_root_dir={tmp_path}"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("looplm: error: ")
    assert "DeepSpeed" in line
