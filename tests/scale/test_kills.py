"""Whatever ends a process, the run goes on from its last checkpoint and ends with the same bits."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import end_of_ranks, fork, fork_looplm, looplm_main, run_looplm
from processes import TWO_ON_CPU, looplm_process

LAST = "checkpoints/last.ckpt"
STEPS = 40


def fit(base: Path, folder: Path, *more: object) -> list[object]:
    return [
        *("fit", "--config", base, f"--trainer.default_root_dir={folder}", "--ckpt_path=last"),
        *("--checkpoint.save_top_k=1", f"--trainer.max_steps={STEPS}", "--model.config.dropout=0.1", *more),
    ]


def finish(argv: list[object], output: Path) -> None:
    process = fork_looplm(argv, output)
    process.join(300)
    assert process.exitcode == 0, output.read_text()


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / LAST, weights_only=True)


def assert_same_run(first: Path, second: Path) -> None:
    one, two = saved(first), saved(second)
    assert one["global_step"] == two["global_step"] == STEPS
    weights = one["state_dict"], two["state_dict"]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


@pytest.fixture(scope="session")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    finish(fit(base, folder), folder / "output")
    return folder


def wait_for(path: Path, process: Any, seconds: float = 300) -> bool:
    """Return whether a path appeared before the process ended."""
    deadline = time.monotonic() + seconds
    while not os.path.lexists(path):
        if not process.is_alive():
            return False
        assert time.monotonic() < deadline, path
        time.sleep(0.0002)
    return True


@pytest.mark.parametrize("num_kills", [pytest.param(3, id="3"), pytest.param(50, id="50", marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_run_ends_with_the_same_bits(
    base: Path, whole: Path, tmp_path: Path, num_kills: int
) -> None:
    chance = random.Random(num_kills)
    argv, folder, kills, in_writing = [], tmp_path / "run", 0, 0
    argv = fit(base, folder)
    while kills < num_kills or in_writing < max(1, num_kills // 10):
        assert kills < num_kills + 20, "no kill met a checkpoint being written"
        process = fork_looplm(argv, tmp_path / "output")
        # Every third kill while a checkpoint is being written, the others whenever.
        writing = folder / "checkpoints" / f".{Path(LAST).name}.saving"
        if kills % 3 == 0 or kills >= num_kills:
            was_written = wait_for(writing, process)
        else:
            was_written = False
            wait_for(folder / LAST, process)
            time.sleep(chance.uniform(0.0, 1.5))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster: begin anew, so that every kill hits a run
            subprocess.run(["rm", "-r", str(folder)], check=True)
            continue
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
        kills += 1
        in_writing += was_written and os.path.lexists(writing)
    finish(argv, tmp_path / "output")
    assert_same_run(folder, whole)


def _fit_with_files_of(num_bytes: int, argv: list[object]) -> int:
    # As on a full disk, write() fails in the middle of the file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return looplm_main([str(part) for part in argv])


def test_full_disk_leaves_the_previous_checkpoint_whole(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(fit(base, folder, "--trainer.max_steps=2"), tmp_path / "output")
    before = (folder / LAST).read_bytes()

    output = tmp_path / "said"
    process = fork(_fit_with_files_of, len(before) // 2, fit(base, folder), output=output)
    process.join(120)
    err = output.read_text()
    assert process.exitcode == 2, err
    line = err.splitlines()[-1]
    assert line.startswith("looplm: error: the checkpoint '")
    assert "could not be written: File too large" in line
    assert "Traceback" not in err
    assert (folder / LAST).read_bytes() == before
    assert saved(folder)["global_step"] == 2
    assert not list((folder / "checkpoints").glob(".*"))


def _fit_with_a_disk_that_fills(largest: int, argv: list[object]) -> int:
    # The shards fit; what the first process adds when all have written does not.
    import looplm.strategy

    def fails(draft: Path, path: Path) -> None:
        raise OSError(28, "No space left on device")

    looplm.strategy._finish = fails
    return looplm_main([str(part) for part in argv])


@pytest.mark.parametrize("when", ["writing", "finishing"])
def test_full_disk_leaves_the_previous_shards_whole(base: Path, tmp_path: Path, when: str) -> None:
    folder = tmp_path / "run"
    shards = ["--config", "conf/overlays/fsdp.yaml", *TWO_ON_CPU]
    shards += ["--trainer.strategy.init_args.save_distributed_checkpoint=true"]
    run_looplm(*fit(base, folder, *shards, "--trainer.max_steps=2"), num_ranks=2)
    before = {path.name: path.read_bytes() for path in (folder / LAST).iterdir()}

    argv = [str(part) for part in fit(base, folder, *shards, "--trainer.max_steps=4")]
    target = {"writing": _fit_with_files_of, "finishing": _fit_with_a_disk_that_fills}[when]
    codes, said = end_of_ranks(target, max(map(len, before.values())) // 2, argv, num_ranks=2)
    assert codes == [2, 2], said
    assert "could not be written; the one before is whole." in said
    assert "Traceback" not in said
    assert {path.name: path.read_bytes() for path in (folder / LAST).iterdir()} == before
    run_looplm(*argv, num_ranks=2)


def signalled(process: Any, folder: Path, number: signal.Signals) -> int | None:
    assert wait_for(folder / LAST, process)
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_between_two_steps_and_the_run_goes_on(
    base: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    rarely = fit(base, folder, "--checkpoint.every_n_train_steps=7", "--trainer.accumulate_grad_batches=1")
    assert signalled(fork_looplm(rarely, output), folder, number) == 128 + number
    step = saved(folder)["global_step"]
    assert f"{number.name}: saved {folder / LAST} after step {step}" in output.read_text()
    assert ("Ctrl-C again ends at once" in output.read_text()) == (number == signal.SIGINT)
    finish(rarely, output)
    assert_same_run(folder, whole)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job whose `scontrol` writes down what it is asked for."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "called"}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    job = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
    node = {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "here"}
    return {**job, **node, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}


def test_slurm_preemption_saves_and_requeues(base: Path, whole: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    folder = tmp_path / "run"
    argv, output = fit(base, folder), tmp_path / "output"
    process = fork_looplm(argv, output, slurm)
    assert signalled(process, folder, signal.SIGUSR1) == 128 + signal.SIGTERM, output.read_text()
    assert (tmp_path / "called").read_text() == "requeue 42\n"
    finish(argv, output)  # what the job does when it is started again
    assert_same_run(folder, whole)


def processes_of(folder: Path) -> list[int]:
    """Return the processes with a folder in their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def wait_for_end(folder: Path, deadline: float) -> None:
    while processes_of(folder):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextlib.contextmanager
def running(argv: list[object], folder: Path, sign: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that has written a file; whatever happens, none of its processes is left."""
    process = looplm_process(*argv)
    try:
        deadline = time.monotonic() + 180
        while not sign.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        for pid in processes_of(folder):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def two_processes(base: Path, folder: Path, strategy: str) -> Iterator[subprocess.Popen[str]]:
    """A long run on two processes that has saved once."""
    overlay = ["--config", f"conf/overlays/{strategy}.yaml", *TWO_ON_CPU]
    with running(fit(base, folder, *overlay, "--trainer.max_steps=100000"), folder, folder / LAST) as process:
        yield process


@pytest.mark.parametrize(
    ("victim", "strategy"),
    [
        ("child", "fsdp"),
        ("parent", "ddp"),
        pytest.param("child", "ddp", marks=pytest.mark.slow),
        pytest.param("parent", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_loss_of_a_rank_ends_the_run_and_leaves_no_process(
    base: Path, tmp_path: Path, strategy: str, victim: str
) -> None:
    folder = tmp_path / "run"
    with two_processes(base, folder, strategy) as process:
        children = [pid for pid in processes_of(folder) if pid != process.pid]
        assert len(children) == 1
        os.kill(children[0] if victim == "child" else process.pid, signal.SIGKILL)
        began = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0
        wait_for_end(folder, began + 60)
        if victim == "child":
            assert "another process of this run has ended" in err or "terminated with code -9" in err
        assert saved(folder)["global_step"] >= 1


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_sigterm_to_one_of_two_processes_saves_and_ends_both(base: Path, tmp_path: Path, strategy: str) -> None:
    folder = tmp_path / "run"
    with two_processes(base, folder, strategy) as process:
        before = saved(folder)["global_step"]
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, err
        wait_for_end(folder, time.monotonic() + 10)
        step = saved(folder)["global_step"]
        assert step >= before
        assert f"SIGTERM: saved {folder / LAST} after step {step}" in err
        assert "weights_only" not in err


def slow_stage(base: Path, folder: Path, stage: str, seconds: float, rank: int = 0) -> list[object]:
    """Return the arguments of a stage that stops in its first batch, and the file by which it says so."""
    slow = ["--trainer.callbacks+=slow_stage.SlowStage", f"--trainer.callbacks.file={folder / 'now'}"]
    slow += [f"--trainer.callbacks.seconds={seconds}", f"--trainer.callbacks.rank={rank}"]
    return [stage, "--config", base, f"--trainer.default_root_dir={folder}", "--model.config.dropout=0.1", *slow]


def signalled_in_stage(argv: list[object], folder: Path, number: int, environment: dict[str, str]) -> tuple[int, str]:
    output = folder.parent / "output"
    process = fork_looplm(argv, output, environment)
    assert wait_for(folder / "now", process), output.read_text()
    os.kill(process.pid or 0, number)
    process.join(60)
    return process.exitcode, output.read_text()


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("test", signal.SIGINT),
        ("test", signal.SIGUSR1),
        ("validate", signal.SIGTERM),
        pytest.param("validate", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("predict", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("predict", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_ends_at_once(
    base: Path, whole: Path, tmp_path: Path, slurm: dict[str, str], stage: str, number: signal.Signals
) -> None:
    folder, problems = tmp_path / "run", tmp_path / "problems"
    problems.write_text("12+34\n")
    argv = [*slow_stage(base, folder, stage, 100), f"--ckpt_path={whole / LAST}", "--trainer.limit_val_batches=1"]
    if stage == "predict":
        argv += [f"--data.predict_file={problems}", "--model.predict_depth=2"]
    code, said = signalled_in_stage(argv, folder, number, slurm)
    assert code == 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM), said
    assert said.endswith(f"\n{number.name}: ended\n")
    assert "Traceback" not in said
    assert (tmp_path / "called").exists() == (number == signal.SIGUSR1)
    if number == signal.SIGUSR1:
        assert (tmp_path / "called").read_text() == "requeue 42\n"
    assert not list(tmp_path.rglob("*.ckpt"))


SANITY = ("--trainer.num_sanity_val_steps=1", "--trainer.limit_val_batches=1", "--data.num_val=4")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_the_sanity_validation_saves_after_the_first_step(
    base: Path, tmp_path: Path, slurm: dict[str, str], number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    rarely = ["--checkpoint.every_n_train_steps=30", "--trainer.max_steps=40"]
    code, said = signalled_in_stage([*slow_stage(base, folder, "fit", 1), *SANITY, *rarely], folder, number, slurm)
    assert code == 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM), said
    assert f"{number.name}: saved {folder / LAST} after step 1;" in said
    assert saved(folder)["global_step"] == 1
    assert not list(folder.glob("hpc*"))
    if number == signal.SIGUSR1:
        assert (tmp_path / "called").read_text() == "requeue 42\n"


@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGINT, 0.2), pytest.param(signal.SIGTERM, 6, marks=pytest.mark.slow)]
)
def test_a_second_signal_in_the_sanity_validation_ends_at_once(
    base: Path, tmp_path: Path, number: signal.Signals, seconds: float
) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    process = fork_looplm([*slow_stage(base, folder, "fit", 100), *SANITY], output)
    assert wait_for(folder / "now", process), output.read_text()
    os.kill(process.pid or 0, number)
    process.join(seconds)
    assert process.is_alive(), output.read_text()
    os.kill(process.pid or 0, number)
    process.join(30)
    assert process.exitcode == 128 + number, output.read_text()
    assert not list(folder.rglob("*.ckpt"))


def test_a_checkpoint_that_lightning_left_for_a_requeue_is_not_taken_up(
    base: Path, whole: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    folder.mkdir()
    (folder / "hpc_ckpt_1.ckpt").write_bytes((whole / LAST).read_bytes())
    for steps in (2, 3):  # without a last.ckpt, and with one
        process = fork_looplm(fit(base, folder, f"--trainer.max_steps={steps}"), output, slurm)
        process.join(120)
        assert process.exitcode == 0, output.read_text()
        assert saved(folder)["global_step"] == steps
    assert "nothing was trained" not in output.read_text()
    assert "hpc" not in output.read_text()


@pytest.mark.parametrize(
    ("victim", "slow_rank", "stage"),
    [
        ("parent", 1, "test"),  # which waits for the child in a collective
        ("child", 0, "test"),
        pytest.param("parent", 0, "test", marks=pytest.mark.slow),
        pytest.param("parent", 0, "validate", marks=pytest.mark.slow),
        pytest.param("child", 1, "validate", marks=pytest.mark.slow),
    ],
)
def test_sigterm_ends_an_evaluation_of_two_processes(
    base: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
    slow_rank: int,
    stage: str,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    folder = tmp_path / "run"
    argv = [*slow_stage(base, folder, stage, 100, slow_rank), f"--ckpt_path={whole / LAST}"]
    argv += ["--config", "conf/overlays/ddp.yaml", *TWO_ON_CPU, "--trainer.limit_val_batches=1"]
    with running(argv, folder, folder / "now") as process:
        time.sleep(1)  # until the other waits for the slow one
        children = [pid for pid in processes_of(folder) if pid != process.pid]
        os.kill(process.pid if victim == "parent" else children[0], signal.SIGTERM)
        began = time.monotonic()
        _, err = process.communicate(timeout=20)
        wait_for_end(folder, began + 20)
        assert "Traceback" not in err
        assert process.returncode != 0
        if victim == "parent":
            assert process.returncode == 128 + signal.SIGTERM, err
            assert time.monotonic() < began + 5
