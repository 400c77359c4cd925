"""``sweep``: fit and test several configs, each in a run directory of its own, then compare them.

A finished run is kept and not repeated as long as its configs, its options and the package's source are the same; a
killed one goes on from its last checkpoint. A directory stands for its base.yaml with each of its other files as an
overlay.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from looplm.commands.arguments import Parser
from looplm.commands.compare import write_comparison
from looplm.commands.curve_files import read_curve
from looplm.commands.curves import Curve
from looplm.commands.next_step import explore_line
from looplm.commands.rows import append_row, read_rows
from looplm.commands.runs import (
    Run,
    check_directory,
    expand_runs,
    is_finished,
    is_fitted,
    prepare_directory,
    run_seed,
    write_stamp,
)
from looplm.errors import InputError

__all__ = ["make_parser", "parse", "run"]

_EXAMPLES = """\
Further options, such as --trainer.max_steps=100, go to every fit and test.

examples:
  python -m looplm sweep conf/stars.yaml conf/fixed_depth.yaml
  python -m looplm sweep conf/study --seeds 0 1 2 --jobs 2 --root runs/study --rows data/study.csv
  python -m looplm sweep conf/stars.yaml --seeds 0 1 --trainer.max_steps=100
"""

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 10.0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _start(arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "looplm", *arguments], **options)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Job:
    """One run at work: waits for its lock, then runs ``fit`` and ``test``, one process at a time."""

    def __init__(self, run: Run, scratch: Path, *, quiet: bool, environment: dict[str, str] | None) -> None:
        self.run, self.scratch, self.quiet, self.environment = run, scratch, quiet, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.arguments: list[str] = []
        self.is_kept = False
        self._lock: IO[bytes] | None = None
        self._steps = self._work()

    def advance(self) -> bool:
        """Start what can be started, without waiting for it; return whether the run is finished.

        Raises:
            InputError: If a process failed or the run's directory is not ours.
        """
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return False
            self.process = None
            if code:
                raise InputError(self._failure(code))
        return next(self._steps, None) is None

    def _work(self) -> Iterator[bool]:
        """Yield after every start of a process, and while another process holds the run."""
        self._lock = (self.scratch / f"{self.run.name}.lock").open("wb")
        announced = False
        while not self._acquire():
            if not announced:
                _say(f"{self.run.directory}: a process of another sweep works there; waiting for its end")
                announced = True
            yield True
        stamp = self.run.stamp
        if is_finished(self.run, stamp):
            _say(f"{self.run.directory}: finished already with this config and this code; kept")
            self.is_kept = True
            return
        prepare_directory(self.run, stamp, self.scratch)
        if not is_fitted(self.run, stamp):
            self._start("fit", "--ckpt_path=last")
            yield True
            write_stamp(self.run.directory / "fitted.json", stamp)
        self._start("test")
        yield True
        write_stamp(self.run.directory / "finished.json", stamp)

    def _acquire(self) -> bool:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _start(self, command: str, *extra: str) -> None:
        assert self._lock is not None
        self.arguments = [command, *self.run.arguments, *extra]
        # The child inherits the lock: where this process is killed, its child keeps other sweeps out until it ends.
        options: dict[str, Any] = {"pass_fds": [self._lock.fileno()], "env": self.environment}
        _say("$ python -m looplm " + " ".join(self.arguments))
        if not self.quiet:
            self.process = _start(self.arguments, **options)
            return
        with self._log.open("ab") as log:
            self.process = _start(self.arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, **options)

    @property
    def _log(self) -> Path:
        return self.run.directory / "output.log"

    def _failure(self, code: int) -> str:
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        text = f"`python -m looplm {' '.join(self.arguments)}` {ended}."
        if self.quiet and self._log.is_file():
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            text += f" Its output is in {self._log}; the last line: {next(filter(str.strip, lines[::-1]), '')}"
        return text

    def terminate(self) -> None:
        """Ask the process to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def close(self) -> None:
        """Wait for the end of the process, force it if need be, and release the run."""
        if self.process is not None:
            try:
                self.process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._lock is not None:
            self._lock.close()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGHUP in a list, so that none comes between a start and the note of its process."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {name: signal.signal(name, lambda number, frame: received.append(number)) for name in names}
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class _Sweep:
    """Works through runs, some at a time."""

    def __init__(self, runs: Sequence[Run], root: Path, *, num_jobs: int, rows: Path | None) -> None:
        self.waiting = deque(runs)
        self.scratch = root / ".sweep"
        self.num_jobs, self.rows = num_jobs, rows
        self.environment: dict[str, str] | None = None
        if num_jobs > 1:
            self.environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, _num_cores() // num_jobs))}
        self.curves: dict[str, Curve] = {}
        self.num_runs = len(runs)

    def work(self) -> list[Curve]:
        """Return the curves of all runs, in the order in which they finished.

        Raises:
            InputError: If a run's directory is not ours, before any starts; or if a run failed: those beside it end
                first, and no further one starts.
            SystemExit: After a signal; the children have ended.
        """
        for run in self.waiting:
            if self._known(run) is None:
                check_directory(run)
        active: list[_Job] = []
        failures: list[str] = []
        with _stop_signals() as received:
            try:
                while (active or (self.waiting and not failures)) and not received:
                    while self.waiting and len(active) < self.num_jobs and not failures and not received:
                        if not self._skip_known(self.waiting[0]):
                            active.append(self._begin(self.waiting[0]))
                        self.waiting.popleft()
                    before = len(active)
                    active = [job for job in active if not self._ended(job, failures)]
                    if active and len(active) == before:
                        time.sleep(_POLL_SECONDS)
            finally:
                for job in active:
                    job.terminate()
                for job in active:
                    job.close()
        if received:
            _say(f"stopped by signal {received[0]}; the same command goes on from here")
            raise SystemExit(128 + received[0])
        if failures:
            raise InputError(" ".join(failures))
        return list(self.curves.values())

    def _begin(self, run: Run) -> _Job:
        quiet = self.num_jobs > 1  # lines of several runs in one terminal would mix
        return _Job(run, self.scratch, quiet=quiet, environment=self.environment)

    def _ended(self, job: _Job, failures: list[str]) -> bool:
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            if not job.advance():
                return False
            self._note(job)
        except InputError as error:
            failures.append(str(error))
        except OSError as error:
            where = str(job.run.directory)
            failures.append(f"{where!r} must be a folder that can be written: {error.strerror}.")
        job.close()
        return True

    def _note(self, job: _Job) -> None:
        run = job.run
        curve = self.curves[run.name] = read_curve(run.directory)
        if not job.is_kept:
            _say(f"{run.directory}: finished ({len(self.curves)} of {self.num_runs})")
        if self.rows is not None and append_row(self.rows, curve, run.stamp, run_seed(run)):
            _say(f"{self.rows}: row of {run.name} added")

    def _known(self, run: Run) -> Curve | None:
        """Return the run's curve from the rows file, unless it is finished on this machine."""
        if self.rows is None:
            return None
        stamp = run.stamp
        return None if is_finished(run, stamp) else read_rows(self.rows).get((run.name, stamp["config_sha256"]))

    def _skip_known(self, run: Run) -> bool:
        """Return whether the rows file has the run; what this machine has not trained is taken from there."""
        known = self._known(run)
        if known is None:
            return False
        _say(f"{self.rows}: has a row of {run.name} with this config; not trained again")
        self.curves[run.name] = known
        return True


_PLAIN_OPTIONS = (
    "--seed_everything",
    "--trainer",
    "--model",
    "--data",
    "--checkpoint",
    "--curve",
    "--guard",
    "--config",
)


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        "sweep",
        description=__doc__,
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "configs", nargs="+", type=Path, metavar="CONFIG", help="config of one run, or folder of base.yaml and overlays"
    )
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the run directories")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="train every config with each")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; they share the cores")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these alone (stars, stars_seed1)")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="CSV that gets a row for every finished run; runs in it are skipped"
    )
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own arguments, and the options that go to every fit and test.

    Raises:
        InputError: If the arguments are wrong.
    """
    parser = make_parser()
    args, options = parser.parse_known_args(argv)
    for option in options:
        # A field of a run's config has dots; what has none is one of this command's, or of these few.
        if option.startswith("--") and "." not in option and option.split("=")[0] not in _PLAIN_OPTIONS:
            parser.error(f"unrecognized arguments: {option.split('=')[0]}")
    if args.jobs < 1:
        raise InputError(f"`--jobs` must be >= 1, got {args.jobs}.")
    return args, options


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    args, options = parse(argv)
    runs = expand_runs(args.configs, root=args.root, options=options, seeds=args.seeds, only=args.only)
    curves = {curve.name: curve for curve in _Sweep(runs, args.root, num_jobs=args.jobs, rows=args.rows).work()}
    write_comparison([curves[one.name] for one in runs], args.root / "compare")
    sys.stdout.write(f"runs:    {args.root}\n{explore_line(one.directory for one in runs)}")
    return 0
