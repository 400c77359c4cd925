"""The process that compares LaTeX with math-verify; run as a script, knows nothing of this package.

It reads one JSON list ``[gold, answer]`` a line and replies with one word a line. Every comparison runs in a fork of
this process with limits on processor time and memory: what an answer does to SymPy (its caches, its memory, its death)
cannot reach the next one, so that a verdict depends on the two texts alone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import sys
from typing import Any

__all__: list[str] = []

# The parser learns its decisions from what it reads, and forks inherit what was learnt before: a third of the time.
_FAMILIAR = [
    (r"\frac{1}{2}", "x+1"),
    (r"\left(2, \frac{\sqrt{3}}{\pi}\right]", r"(-\infty, 2) \cup [3, 4)"),
    (r"\begin{pmatrix} -1/3 & 2 \\ 0 & x^2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 0 & 2 \end{pmatrix}"),
    ("5x - 7y + 11z + 4 = 0", "y = 2x^{3} - 1"),
    (r"1, -2, 3 \pm 2\sqrt{2}", r"\{1, -2\}"),
    (r"6 - 5i", r"\cot x + 2 \cdot 3"),
    (r"x \in [-2,7]", r"x > 3"),
    (r"(a+5)(b+2)", r"ab+2a+5b+10"),
]
_NO_TIMEOUT: Any = None  # math-verify's own uses SIGALRM; the limits here bound memory too, and C code


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # Text in \boxed is read by the LaTeX grammar; the other reader of math-verify evaluates Python expressions.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    found: list[Any] = parse(f"\\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=_NO_TIMEOUT)
    return found


def _verdict(gold: str, answer: str) -> str:
    from math_verify import verify

    parsed = _parse(answer)
    if not parsed:
        return "unreadable"
    try:
        equal = verify(_parse(gold), parsed, timeout_seconds=_NO_TIMEOUT, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # two things that cannot be compared
        equal = False
    return "equal" if equal else "different"


def _compare_here(gold: str, answer: str, cpu_seconds: int, memory_bytes: int) -> str:
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where the system knows no such limit (macOS), that of time bounds what can be allocated.
    if sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        return _verdict(gold, answer)
    except MemoryError:
        return "limit"
    except Exception:  # a text that a parser chokes on, in whatever way
        return "unreadable"


def _compare(gold: str, answer: str, cpu_seconds: int, wall_seconds: float, memory_bytes: int) -> str:
    """Compare in a fork; ``limit`` if it dies or takes too long."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, _compare_here(gold, answer, cpu_seconds, memory_bytes).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], wall_seconds)
    reply = os.read(reading, 64).decode() if ready else ""
    os.close(reading)
    if not reply:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return reply or "limit"


def _serve(cpu_seconds: int, wall_seconds: float, memory_bytes: int) -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # nothing that a library prints can be taken for a reply
        os.dup2(nowhere, stream)
    logging.disable(logging.CRITICAL)
    for gold, answer in _FAMILIAR:
        _verdict(gold, answer)
    os.write(replies, b"ready\n")
    for line in requests:
        gold, answer = json.loads(line)
        os.write(replies, f"{_compare(gold, answer, cpu_seconds, wall_seconds, memory_bytes)}\n".encode())


if __name__ == "__main__":
    try:
        _serve(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    except BrokenPipeError:  # the process that asked is gone
        sys.exit(1)
