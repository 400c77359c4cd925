"""The processes of one run: none outlives the one that started it, and the loss of one is said in words."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal

__all__ = ["die_with_parent", "lost_process"]

_PR_SET_PDEATHSIG = 1
# Launchers of their own end all processes themselves, and are not the parents of ours.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def die_with_parent() -> None:
    """In a process that Lightning started for another rank: ask the kernel to end it when its parent is gone.

    Else it waits in a collective for a rank zero that was killed, for as long as that collective's timeout.

    Example:
        >>> die_with_parent()  # first in the program; rank zero, which no other rank started, is left as it is
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or any(name in os.environ for name in _LAUNCHERS):
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it went before we asked
            os.kill(os.getpid(), signal.SIGKILL)


def lost_process(error: BaseException) -> bool:
    """Return whether an error says that another process of the run has gone.

    Example:
        >>> lost_process(RuntimeError("[gloo] Connection closed by peer")), lost_process(RuntimeError("out of memory"))
        (True, False)
    """
    text = str(error)
    return isinstance(error, RuntimeError) and bool(
        re.search(r"gloo|NCCL|ProcessGroup|TCPStore", text)
        and re.search(r"closed by peer|reset by peer|[Tt]imed? ?out|Broken pipe|remote (process|worker)|refused", text)
    )
