"""A run small enough for several processes on one core, started as users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from forks import ROOT

TWO_ON_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=2")

BASE: dict[str, Any] = {
    "seed_everything": 3,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 5,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 0.3,
        "logger": False,
    },
    "checkpoint": {"every_n_train_steps": 1, "save_top_k": -1},
    "model": {
        "config": {
            "width": 16,
            "num_heads": 2,
            "ffn_width": 32,
            "dropout": 0.0,
            "init_std": 0.2,
            "num_prelude_layers": 1,
            "num_core_layers": 2,
            "num_coda_layers": 1,
        },
        "objective": {
            "depth_sampler": {"class_path": "UniformDepth", "init_args": {"min_depth": 1, "max_depth": 5}},
            # Deep steps leave the prelude without gradient, shallow ones do not.
            "backprop_loops": 3,
            "checkpoint_loops": 2,
            "penalty": {"class_path": "JacobianPenalty"},
            "penalty_weight": 0.2,
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.0}},
        "lr_schedule": {"min_ratio": 1.0},
        "val_depths": [1, 4],
        "test_depths": [0, 3],
    },
    "data": {
        "class_path": "ArithmeticDataModule",
        # Answers of one to three digits: ranks hold different numbers of labelled tokens.
        "init_args": {"operations": ["-", "+"], "min_digits": 2, "max_digits": 2, "batch_size": 4, "num_test": 21},
    },
}


def environment() -> dict[str, str]:
    # Forked gloo threads and several OpenMP threads have hung; sums also depend on the number of threads.
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def looplm_process(*argv: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "looplm", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
        **options,
    )
