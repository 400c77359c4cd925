"""Shared fixtures: a run so small that a training step takes milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

# Lightning's log handlers keep the stderr they find when first imported; inside a test that would be the test's own,
# which is closed when it ends.
import looplm.commands.lightning  # noqa: F401

TINY: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "checkpoint": {"every_n_train_steps": 2},
    "model": {
        "config": {"width": 16, "num_heads": 2, "ffn_width": 32, "dropout": 0.0},
        "objective": {"depth_sampler": {"class_path": "UniformDepth", "init_args": {"min_depth": 1, "max_depth": 4}}},
        "val_depths": [1, 4],
        "test_depths": [0, 2, 8],
        "predict_depth": 2,
        "max_new_tokens": 4,
    },
    "data": {
        "class_path": "ArithmeticDataModule",
        "init_args": {"min_digits": 2, "max_digits": 2, "batch_size": 8, "num_val": 16, "num_test": 20},
    },
}


def merge(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with dotted keys replaced, for example ``{"trainer.max_steps": 2}``."""
    config = copy.deepcopy(config)
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """Write the tiny config, some of its dotted keys replaced, and return its path."""

    def write(name: str = "tiny", **overrides: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        path.write_text(yaml.safe_dump(merge(TINY, dotted)), encoding="utf-8")
        return path

    return write
