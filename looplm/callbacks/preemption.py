"""A run that is told to end saves between two steps and, under SLURM, asks to be started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["SaveOnSignal"]

# A launcher and rank zero may both pass one SIGTERM on; what comes later than this is another.
_SECONDS_APART = 5.0
# Some clusters end a whole job when one of its processes has: not before rank zero has asked for the requeue.
_REQUEUE_SECONDS = 5.0


class SaveOnSignal(L.Callback):
    """On SIGTERM, Ctrl-C or SLURM's requeue signal (SIGUSR1), finishes the step, saves ``last.ckpt`` and ends the run.

    Lightning's own handlers act where the signal finds the process: the checkpoint may fall between an optimiser's step
    and the counters, and in a handler of one rank a collective meets another collective of the rest. Here they are not
    installed. In ``fit``, from the sanity validation on, a handler sets a flag, and after the optimiser step on which
    all ranks agree the checkpoint is one of the usual kind, from which a run goes on bit for bit. After the requeue
    signal rank zero calls ``scontrol requeue``. Exit code 143, after Ctrl-C 130.

    A signal that comes during validation waits for its end. A second Ctrl-C ends at once, without a checkpoint, as does
    a second SIGTERM, five seconds or more after the first, in the sanity validation.

    ``validate``, ``test`` and ``predict`` have nothing to save: they end at once, even while a collective waits for
    another rank, with the same exit codes and after the same requeue. In an interactive Python Ctrl-C never ends the
    interpreter, but raises ``KeyboardInterrupt`` where it would.

    Example:
        >>> trainer = L.Trainer(accelerator="cpu", callbacks=[SaveOnSignal()], logger=False)
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.has_trained = False
        self._received_at: float | None = None
        self._last_step = -1
        self._requeue_signal: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See to it that Lightning, when it comes to its signal handlers, installs ours."""
        trainer._signal_connector = _Signals(trainer, self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where the run stands."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and end, if any rank was told to.

        Raises:
            SIGTERMException: After saving, with the exit code.
        """
        self.has_trained = True
        if trainer.global_step == self._last_step:  # gradients are being accumulated, and are not saved
            return
        self._last_step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return
        checkpoint = trainer.checkpoint_callback
        folder = checkpoint.dirpath if isinstance(checkpoint, ModelCheckpoint) else None
        path = Path(folder or trainer.default_root_dir) / "last.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        name = signal.Signals(self.received or signal.SIGTERM).name
        rank_zero_info(f"{name}: saved {path} after step {trainer.global_step}; `--ckpt_path last` goes on from there")
        if self._requeue_signal is not None and self.received == self._requeue_signal and trainer.is_global_zero:
            _requeue()
        raise SIGTERMException(_exit_code(self.received))

    def _begin(self, trainer: L.Trainer) -> set[int]:
        """Return the signals that are ours in a stage that begins."""
        self.received = self._received_at = self._requeue_signal = None
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
        numbers = {int(signal.SIGTERM), int(self._requeue_signal or signal.SIGTERM)}
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is where a shell runs this in the background
            numbers.add(int(signal.SIGINT))
        return numbers

    def _receive(self, trainer: L.Trainer, number: int) -> None:
        """Remember a signal until the step is done; in the main thread, between two of its instructions."""
        if self._ends_at_once(trainer, number, self._received_at):
            if number == signal.SIGINT and _is_interactive():
                raise KeyboardInterrupt
            return  # the thread that listens ends it
        if self.received is not None:
            return
        self.received, self._received_at = number, time.monotonic()
        if number == signal.SIGINT:  # of which a terminal tells the other ranks itself
            if trainer.is_global_zero:
                os.write(2, b"\nending after this step, with a checkpoint; Ctrl-C again ends at once\n")
        elif trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)  # the processes that Lightning started for other ranks

    def _ends_at_once(self, trainer: L.Trainer, number: int, first_at: float | None) -> bool:
        """Return whether a signal is not to wait, given when the first one came."""
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        if first_at is None:
            return False
        is_another = time.monotonic() - first_at >= _SECONDS_APART
        return number == signal.SIGINT or (number == signal.SIGTERM and trainer.sanity_checking and is_another)

    def _end_at_once(self, trainer: L.Trainer, number: int, first: int) -> None:
        """End this process and those that it started, without a collective, for which another rank may be late."""
        if number == signal.SIGINT and _is_interactive():
            return
        if self._requeue_signal is not None and self._requeue_signal in (number, first):
            if trainer.is_global_zero:
                _requeue()
            else:
                time.sleep(_REQUEUE_SECONDS)
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if trainer.is_global_zero:
            os.write(2, f"\n{signal.Signals(number).name}: ended\n".encode())
        os._exit(_exit_code(number))


# The writing ends of pipes into which this process's signals go.
_pipes: set[int] = set()


def _let_go() -> None:
    """In a fork: write no signals into the pipes of its parent."""
    if _pipes:
        signal.set_wakeup_fd(-1)
    while _pipes:
        os.close(_pipes.pop())


os.register_at_fork(after_in_child=_let_go)


class _Signals(_SignalConnector):
    """Lightning's place for signal handlers, with ours.

    A handler runs in the main thread, and not while that waits in a collective; a thread hears of the signal at once.
    """

    def __init__(self, trainer: L.Trainer, owner: SaveOnSignal) -> None:
        super().__init__(trainer)
        self._owner = owner
        self._pipe = self._other_pipe = -1

    def register_signal_handlers(self) -> None:
        """Install our handlers; `teardown` restores what was there before."""
        self.received_sigterm = False
        if threading.current_thread() is not threading.main_thread():
            return
        self._original_handlers = self._get_current_signal_handlers()
        trainer, process, numbers = self.trainer, os.getpid(), self._owner._begin(self.trainer)

        def receive(number: int, frame: Any) -> None:
            if os.getpid() == process:  # and not in a worker of the data, to which a terminal sends Ctrl-C too
                self._owner._receive(trainer, number)

        reading, self._pipe = os.pipe()
        _pipes.add(self._pipe)
        os.set_blocking(self._pipe, False)
        threading.Thread(target=self._listen, args=(reading, numbers), name="signals", daemon=True).start()
        self._other_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, receive)

    def _listen(self, reading: int, numbers: set[int]) -> None:
        first: int | None = None
        first_at: float | None = None
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while received := pipe.read(1):
                number = received[0]
                if number not in numbers:
                    continue
                if self._owner._ends_at_once(self.trainer, number, first_at):
                    self._owner._end_at_once(self.trainer, number, number if first is None else first)
                if first is None:
                    first, first_at = number, time.monotonic()

    def teardown(self) -> None:
        """Restore the handlers and let the thread end."""
        if self._pipe in _pipes:
            signal.set_wakeup_fd(self._other_pipe)
            _pipes.remove(self._pipe)
            os.close(self._pipe)
        super().teardown()


def _exit_code(number: int | None) -> int:
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def _is_interactive() -> bool:
    return hasattr(sys, "ps1")


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        code = subprocess.run(["scontrol", "requeue", job]).returncode
    except OSError as error:
        rank_zero_warn(f"`scontrol requeue {job}` could not be run: {error.strerror}.")
        return
    if code != 0:
        rank_zero_warn(f"`scontrol requeue {job}` failed with exit code {code}.")
