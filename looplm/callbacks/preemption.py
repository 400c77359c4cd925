"""A run that is told to end saves between two steps and, under SLURM, asks to be started again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["SaveOnSignal"]


class SaveOnSignal(L.Callback):
    """On SIGTERM, Ctrl-C or SLURM's requeue signal (SIGUSR1), finishes the step, saves ``last.ckpt`` and ends the run.

    Lightning's own handlers act where the signal finds the process: the checkpoint may fall between an optimiser's step
    and the counters, and in a handler of one rank a collective meets another collective of the rest. Here a handler
    sets a flag, and after the optimiser step on which all ranks agree the checkpoint is one of the usual kind, from
    which a run goes on bit for bit. After the requeue signal rank zero calls ``scontrol requeue``. Exit code 143, after
    Ctrl-C 130.

    A signal that comes during validation waits for its end. A second Ctrl-C ends at once, without a checkpoint.

    Example:
        >>> trainer = L.Trainer(accelerator="cpu", callbacks=[SaveOnSignal()], logger=False)
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.has_trained = False
        self._last_step = -1
        self._requeue_signal: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over; Lightning restores what was there before it at the end."""
        self.received, self._last_step = None, trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        environment: Any = getattr(trainer.strategy, "cluster_environment", None)
        if environment is None and SLURMEnvironment.detect():
            environment = SLURMEnvironment()
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1

        def receive(number: int, frame: Any) -> None:
            if number == signal.SIGINT:  # of which a terminal tells the other ranks itself
                if self.received is not None:
                    raise KeyboardInterrupt
                if trainer.is_global_zero:
                    os.write(2, b"\nending after this step, with a checkpoint; Ctrl-C again ends at once\n")
            elif self.received is None and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)  # the processes that Lightning started for other ranks
            self.received = number

        numbers = {signal.SIGTERM, self._requeue_signal or signal.SIGTERM}
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is where a shell runs this in the background
            numbers.add(signal.SIGINT)
        for number in numbers:
            signal.signal(number, receive)

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
        raise SIGTERMException(128 + (signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM))


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
