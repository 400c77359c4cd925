"""The compiled step against the eager one, and how often a run of random depths compiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.utils import counters

from looplm.depth import LogNormalDepth
from looplm.randomness import StepKey

from .timing import Measurement, Row, paired_seconds, ratio_of
from .training_step import STARS, Precision, addition_batch, addition_model, model_step

__all__ = ["compile_rows"]


# Whose parts torch has no kernels for on a CPU, but for attention.
_OUROS_BLOCK = {
    "norm_type": "rms_norm",
    "norm_placement": "sandwich_branch",
    "positions": "rotary",
    "activation": "swiglu",
    "loop_norm": True,
    "use_bias": False,
}
_MODELS: list[tuple[str, dict[str, Any], Precision]] = [
    ("the addition model", {}, "32-true"),
    ("the addition model with dropout 0.1", {"dropout": 0.1}, "32-true"),
    ("Ouro's block", _OUROS_BLOCK, "32-true"),
    ("Ouro's block, bf16-mixed", _OUROS_BLOCK, "bf16-mixed"),
]


def compile_rows(num_rounds: int) -> list[Row]:
    """Steps of two kinds of blocks, and the graphs of 200 random depths, truncated and penalised."""
    rows = []
    for name, fields, precision in _MODELS:
        torch._dynamo.reset()
        compiled = addition_model(**fields)
        compiled.compile_core()
        steps = (model_step(model, STARS, precision) for model in (addition_model(**fields), compiled))
        measured = ratio_of(*paired_seconds(*steps, num_rounds))
        rows.append(Row(f"compiled STARS step of {name}", "eager", measured, 1.2, "at least", "x faster"))
    return rows + _graph_rows()


def _graph_rows() -> list[Row]:
    torch._dynamo.reset()
    counters.clear()
    model, batch = addition_model(width=64), addition_batch(16)
    model.compile_core()
    sampler = LogNormalDepth(mu=1.7, sigma=0.7, min_depth=1, max_depth=40)
    objective = replace(STARS, depth_sampler=sampler, backprop_loops=6)
    graphs = []
    for step in range(200):
        objective(model, batch, StepKey(seed=0, micro_batch=step)).loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    late = Measurement.exact(graphs[-1] - graphs[9])
    depths = "200 random depths"
    return [
        Row("graphs compiled", depths, Measurement.exact(graphs[-1]), 5, "at most", ""),
        Row("of them after the tenth step", depths, late, 0, "at most", ""),
    ]
