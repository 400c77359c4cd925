"""``python -m tests.benchmarks``: a table of ratios beside their targets.

Everything is timed in turns in one process, so that another load on the machine meets both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is loaded, which reads it

import torch

from .compiled_step import compile_rows
from .depth_curve import curve_rows
from .generation_speed import generation_rows
from .gpu import gpu_rows
from .memory import memory_rows
from .start_up import start_rows
from .step_profile import step_profile
from .timing import Row
from .training_step import authors_rows, data_rows, penalty_rows

__all__ = ["GROUPS", "Group", "main"]

Group: TypeAlias = Callable[[int], Iterable[Row]]  # takes the number of rounds

GROUPS: dict[str, Group] = {
    "penalty": penalty_rows,
    "authors": authors_rows,
    "data": data_rows,
    "memory": memory_rows,
    "start": start_rows,
    "generation": generation_rows,
    "compile": compile_rows,
    "curve": curve_rows,
    "gpu": gpu_rows,  # where there is one
}


def _line(row: Row) -> str:
    measured = row.measured
    value = f"{measured.value:.3g} {row.unit}".rstrip()
    interval = "" if measured.low == measured.high else f" [{measured.low:.3g}, {measured.high:.3g}]"
    verdict = "pass" if row.is_met else "MISS"
    return f"{verdict}  {row.what} / {row.against}: {value}{interval}, {row.bound} {row.target:g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the groups that are asked for; return 1 where a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, metavar="NAME", help=f"{', '.join(GROUPS)}; the last needs a CUDA device"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: wide intervals")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, after every group")
    parser.add_argument("--profile", action="store_true", help="only show where the time of a step goes")
    options = parser.parse_args(argv)
    if options.profile:
        for width in (256, 512):
            sys.stdout.write(f"{step_profile(width, 2 if options.quick else 10)}\n\n")
        return 0
    has_gpu = torch.cuda.is_available()
    if "gpu" in (options.only or ()) and not has_gpu:
        sys.stderr.write(f"{parser.prog}: error: the group `gpu` needs a CUDA device; there is none here\n")
        return 2
    rows: list[tuple[str, Row]] = []
    for name in options.only or [name for name in GROUPS if name != "gpu" or has_gpu]:
        for row in GROUPS[name](3 if options.quick else 25):
            rows.append((name, row))
            sys.stdout.write(_line(row) + "\n")
            sys.stdout.flush()
        if options.json is not None:
            machine: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
            machine |= {"gpu": torch.cuda.get_device_name() if has_gpu else None, "quick": options.quick}
            content = {**machine, "rows": [{"group": group, **row.to_dict()} for group, row in rows]}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(row.is_met for _, row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
