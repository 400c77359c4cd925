"""Whether two LaTeX texts are equal, within bounds of time and memory that no text can break.

Knows the protocol of the process that does it, and no mathematics.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

from lightning_utilities.core.imports import RequirementCache

from looplm.errors import InputError

__all__ = ["Comparison", "SymbolicComparer", "check_math_verify"]

Comparison = Literal["equal", "different", "unreadable", "limit"]

_MATH_VERIFY = RequirementCache("math-verify>=0.8", "math_verify")
_SERVER = Path(__file__).with_name("symbolic_server.py")
_START_SECONDS = 300.0  # it takes two of processor time; machines can be busy
_MAX_CHARACTERS = 2_000  # no answer is longer; parsers take more than linear time


def check_math_verify() -> None:
    """Say now, and not in the middle of an evaluation, that LaTeX cannot be graded here.

    Raises:
        InputError: If math-verify is not installed.

    Example:
        >>> check_math_verify()
    """
    if not _MATH_VERIFY:
        raise InputError("grading LaTeX answers needs math-verify: pip install 'looplm[math]'.")


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork must not stop the process of its parent
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with the fork that may be computing
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


class SymbolicComparer:
    """Compares LaTeX through math-verify (SymPy) in a process of its own, started at the first use.

    Every comparison has ``cpu_seconds`` of processor time and ``memory_mb`` of address space. A text that wants more,
    such as ``9**9**9**9``, gives ``limit``; the next comparison is not touched by it. The process is started again if
    it dies, serves all threads (one at a time), is not shared with forks, and ends with this object or program, also
    when the program is killed. A verdict depends on the two texts alone, unless a comparison takes about as long as it
    may.

    Args:
        cpu_seconds: Processor time of a comparison, in whole seconds; four times it, and two, on the wall clock.
        memory_mb: Address space of a comparison, in MiB, Python and SymPy (about 250) included.

    Raises:
        ValueError: If a limit is out of its range.

    Example:
        >>> with SymbolicComparer() as comparer:
        ...     comparer.compare(r"2k+2", r"2(k+1)")
        'equal'
    """

    def __init__(self, cpu_seconds: int = 3, memory_mb: int = 1024) -> None:
        if cpu_seconds < 1:
            raise ValueError(f"`cpu_seconds` must be >= 1, got {cpu_seconds}.")
        if memory_mb < 512:
            raise ValueError(f"`memory_mb` must be >= 512, got {memory_mb}.")
        self.cpu_seconds, self.memory_mb = cpu_seconds, memory_mb
        self.wall_seconds = 4.0 * cpu_seconds + 2.0
        self._clear()
        _ALIVE.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cpu_seconds, self.memory_mb)

    def _clear(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., SymbolicComparer] | None = None
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Let go of the process without ending it: it belongs to the program that this one was forked from."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._clear()

    def __enter__(self) -> SymbolicComparer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, after the comparison that runs; the next one starts another."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def compare(self, gold: str, answer: str) -> Comparison:
        """Compare two LaTeX texts without dollar signs around them.

        Args:
            gold: The true answer.
            answer: The answer to grade.

        Returns:
            ``equal``, ``different``, ``unreadable`` (the answer is no mathematics) or ``limit`` (it wanted too much).

        Raises:
            InputError: If math-verify is not installed.
        """
        if max(len(gold), len(answer)) > _MAX_CHARACTERS:
            return "limit"
        check_math_verify()
        with self._lock:
            for _ in range(2):  # once more if the process had died in the meantime
                reply = self._ask(gold, answer)
                if reply is not None:
                    return reply
            return "limit"

    def _ask(self, gold: str, answer: str) -> Comparison | None:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        except OSError:
            self._end()
            return None
        line = self._read_line(process, self.wall_seconds + 10.0)
        if line not in ("equal", "different", "unreadable", "limit"):
            self._end()
            return None
        return cast("Comparison", line)

    def _start(self) -> subprocess.Popen[bytes]:
        limits = [str(self.cpu_seconds), str(self.wall_seconds), str(self.memory_mb * 2**20)]
        process = subprocess.Popen(
            [sys.executable, "-P", str(_SERVER), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the order of SymPy's sets, so that verdicts repeat
            start_new_session=True,  # an interrupt of the terminal is for the program, which ends this process
        )
        self._process = process
        self._finalizer = weakref.finalize(self, _stop, process, os.getpid())
        if self._read_line(process, _START_SECONDS) != "ready":
            self._end()
            raise RuntimeError(f"the process that grades LaTeX did not start within {_START_SECONDS:g} s.")
        return process

    @staticmethod
    def _read_line(process: subprocess.Popen[bytes], seconds: float) -> str:
        """Return the next line without its end; what there is of it if the process ends or time is up."""
        assert process.stdout is not None
        pipe, text, deadline = process.stdout.fileno(), b"", time.monotonic() + seconds
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(pipe, 4096) if ready else b""
            if not part:
                break
            text += part
        return text.decode(errors="replace").rstrip("\n")


_ALIVE: weakref.WeakSet[SymbolicComparer] = weakref.WeakSet()


def _forget_all() -> None:
    for comparer in list(_ALIVE):
        comparer.forget()


os.register_at_fork(after_in_child=_forget_all)
