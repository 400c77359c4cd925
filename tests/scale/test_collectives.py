"""Under FSDP 2 the weights travel once a step, whatever the number of loops."""

from __future__ import annotations

import json

from counted_step import main
from forks import run_ranks


def test_a_sharded_step_gathers_once_and_scatters_once_at_any_depth() -> None:
    (counts,) = [line for line in run_ranks(main, num_ranks=2).splitlines() if line.startswith("{")]
    once = {"_allgather_base_": 1, "_reduce_scatter_base_": 1}
    assert json.loads(counts) == {"2": once, "8": once}
