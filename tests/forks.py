"""Real processes that start in no time: forked from a server that has imported everything once."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import looplm

ROOT = Path(looplm.__file__).parents[1]


def _child(output: str, environment: dict[str, str], target: Callable[..., int | None], *args: Any) -> None:
    import torch

    os.chdir(ROOT)
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    code = target(*args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def fork(
    target: Callable[..., int | None], *args: Any, output: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start ``target(*args)`` with one thread; its exit code is what it returns, its words are appended to a file."""
    # Forked gloo threads and several OpenMP threads have hung; sums also depend on the number of threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["looplm.commands.lightning"])
    process = context.Process(target=_child, args=(str(output), dict(environment or {}), target, *args))
    process.start()
    return process


def looplm_main(argv: Sequence[str]) -> int:
    """Run a command; a function of a module that a new process can import."""
    from looplm.cli import main

    return main(argv)


def fork_looplm(argv: Sequence[object], output: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Start ``python -m looplm argv``."""
    return fork(looplm_main, [str(part) for part in argv], output=output, environment=environment)


def end_of_ranks(
    target: Callable[..., int | None], *args: Any, num_ranks: int, timeout: float = 240
) -> tuple[list[int | None], str]:
    """Run ranks, which find each other as ``torchrun``'s do; return their exit codes and what they wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "GROUP_RANK": "0"}
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked", **size}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(num_ranks)]
        start = functools.partial(fork, target, *args)
        ranks = [
            start(
                output=output,
                environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else None,
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            for rank in ranks:
                rank.join(timeout)
        finally:
            for rank in ranks:
                rank.kill()
        return [rank.exitcode for rank in ranks], "\n".join(output.read_text() for output in outputs)


def run_ranks(target: Callable[..., int | None], *args: Any, num_ranks: int = 1, timeout: float = 240) -> str:
    """Run ranks as :func:`end_of_ranks` does to their good end; return what they wrote."""
    codes, said = end_of_ranks(target, *args, num_ranks=num_ranks, timeout=timeout)
    assert codes == [0] * num_ranks, said
    return said


def run_looplm(*argv: object, num_ranks: int = 1) -> str:
    """Run a command to its good end and return what it wrote."""
    return run_ranks(looplm_main, [str(part) for part in argv], num_ranks=num_ranks)
