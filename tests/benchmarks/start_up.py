"""How long it takes until the program does something."""

from __future__ import annotations

import subprocess
import sys

from .timing import Row, paired_seconds, ratio_of, timed

__all__ = ["start_rows"]

_HEAVY = ("lightning", "torchmetrics", "datasets", "torch")


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def start_rows(num_rounds: int) -> list[Row]:
    """Import and help, in processes of their own."""
    check = f"import looplm.cli, sys; looplm.cli.main(['--help']); assert not set({_HEAVY}) & set(sys.modules)"
    _run("-c", check)
    rounds = max(num_rounds // 4, 3)

    def lightning_cli() -> None:
        _run("-c", "import lightning.pytorch.cli")

    rows = []
    for name, target in (("--help", 0.2), ("fit --help", 1.3)):
        times = paired_seconds(lambda name=name: _run("-m", "looplm", *name.split()), lightning_cli, rounds)
        what = f"python -m looplm {name}"
        rows.append(Row(what, "import lightning.pytorch.cli", ratio_of(*times), target, "at most"))
    seconds = [timed(lambda: _run("-c", "import looplm"))[0] for _ in range(rounds)]
    measured = ratio_of(seconds, [1.0] * len(seconds))
    return [Row("import looplm, with Python", "the clock", measured, 3.0, "at most", "s"), *rows]
