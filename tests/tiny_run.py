"""A run so small that a training step takes milliseconds."""

from __future__ import annotations

import copy
from typing import Any

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
