"""Real processes that start in no time: forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def _main(argv: list[str], output: str) -> None:
    import torch

    from looplm.cli import main

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    code = main(argv)
    sys.stderr.flush()
    os._exit(code)


def fork_looplm(argv: Sequence[object], output: Path) -> BaseProcess:
    """Start ``python -m looplm argv``; what it writes is appended to ``output``."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["looplm.commands.lightning"])
    process = context.Process(target=_main, args=([str(part) for part in argv], str(output)))
    process.start()
    return process
