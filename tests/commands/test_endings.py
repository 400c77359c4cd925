"""What a run shows while it goes on, in a terminal and in a pipe, and what it says at its end."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_models import run_of_sums, run_of_texts

from looplm.cli import main
from looplm.commands import consolidate
from looplm.commands.explore import make_parser
from looplm.commands.explorer.opening import open_model
from looplm.corpora.text_tokenizer import ByteTokenizer

Config = Callable[..., Path]
NEXT = re.compile(r"(?:next: +|^ +)(python -m looplm .*)", re.M)


def _told(caplog: pytest.LogCaptureFixture) -> list[list[str]]:
    """Return the commands that were told since the last call, as arguments."""
    found = [shlex.split(line)[3:] for line in NEXT.findall(caplog.text)]
    caplog.clear()
    return found


def test_every_run_says_a_next_command_that_works(
    write_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "my run"
    (tmp_path / "problems").write_text("12+34\n")
    assert main(["fit", "--config", str(write_config(trainer__default_root_dir=str(root)))]) == 0
    files = r"\((?:config.yaml, checkpoints/, )?(val_.*)\)"
    for name in re.findall(f"run directory: {re.escape(str(root))} {files}", caplog.text)[0].split(", "):
        assert (root / name).is_file()
    (test,) = _told(caplog)
    assert test[0] == "test"
    assert main(test) == 0
    assert f"curve: {root} (test_curve.csv, " in caplog.text
    compare, explore = _told(caplog)
    assert compare[:2] == ["compare", str(root)]
    assert open_model(explore[1]).form.expected("12+34") == "46"
    predict = ["predict", "--config", str(root / "config.yaml"), f"--data.predict_file={tmp_path / 'problems'}"]
    assert main(predict) == 0
    assert _told(caplog) == [explore]
    assert main(["validate", "--config", str(root / "config.yaml")]) == 0
    assert f"curve: {root} (val_curve.csv, val_curve.png, val_settling.png, val_summary.json)" in caplog.text
    assert _told(caplog) == [explore]
    # Of other weights than the run's last, it is those that are named.
    other = next((root / "checkpoints").glob("epoch*.ckpt"))
    assert main([*predict, f"--ckpt_path={other}"]) == 0
    assert _told(caplog) == [["explore", str(other)]]
    # Weights of no run are opened with the config of the run that was tested.
    alone = tmp_path / "weights.ckpt"
    shutil.copy(other, alone)
    assert main([*predict, f"--ckpt_path={alone}"]) == 0
    assert _told(caplog) == [["explore", str(alone), "--config", str(root / "config.yaml")]]
    capsys.readouterr()
    assert main(["compare", str(root), f"--output={tmp_path / 'out'}"]) == 0
    assert shlex.split(NEXT.findall(capsys.readouterr().out)[0])[3:] == explore


def _last_line(capsys: pytest.CaptureFixture[str]) -> list[str]:
    (line,) = NEXT.findall(capsys.readouterr().out)
    return shlex.split(line)[3:]


def _opens(explore: list[str]) -> bool:
    args = make_parser().parse_args(explore[1:])
    return explore[0] == "explore" and open_model(args.source, config=args.config).form is not None


def test_a_model_of_sums_is_told_to_be_explored_with_its_runs_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_sums(tmp_path / "my run")
    config, folder, back = run / "config.yaml", tmp_path / "my export", tmp_path / "my back.ckpt"
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), str(folder)]) == 0
    told = _last_line(capsys)
    assert told == ["explore", str(folder), "--config", str(config)]
    assert _opens(told)
    assert main(["import", str(folder), str(back)]) == 0
    told = _last_line(capsys)
    assert told[:4] == ["explore", str(back), "--config", "CONFIG"]
    assert _opens([*told[:3], str(config)])
    (tmp_path / "moved.ckpt").write_bytes(back.read_bytes())
    assert main(["export", str(tmp_path / "moved.ckpt"), str(tmp_path / "other")]) == 0
    assert _last_line(capsys)[:4] == ["explore", str(tmp_path / "other"), "--config", "CONFIG"]


def test_a_model_of_texts_is_told_to_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of_texts(tmp_path / "run", ByteTokenizer())
    folder, back = tmp_path / "my export", tmp_path / "my back.ckpt"
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), str(folder), "--num_loops", "3"]) == 0
    arguments = f"pretrained={folder},num_loops=3"
    assert _last_line(capsys) == ["eval", "--model", "looplm", "--model_args", arguments, "--tasks", "gsm8k"]
    assert _opens(["explore", str(folder)])  # with the tokenizer that the harness reads, too
    assert main(["import", str(folder), str(back)]) == 0
    told = _last_line(capsys)
    assert told == ["explore", str(back)]
    assert _opens(told)
    assert main(["import", str(folder), str(back)]) == 2  # as export and consolidate
    assert f"{str(back)!r} exists already" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "of the run")]) == 0
    assert (tmp_path / "of the run" / "config.json").is_file()


def test_a_consolidated_checkpoint_is_told_with_its_runs_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = run_of_sums(tmp_path / "my run"), tmp_path / "one file.ckpt"
    monkeypatch.setattr(consolidate, "read_sharded", lambda folder: {})
    for checkpoint, config in ((run / "checkpoints" / "last.ckpt", str(run / "config.yaml")), (tmp_path, "CONFIG")):
        assert main(["consolidate", str(checkpoint), str(file)]) == 0
        assert _last_line(capsys) == ["test", "--config", config, "--ckpt_path", str(file)]
        file.unlink()


def test_generated_problems_are_told_to_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my {rows}, new.jsonl"
    assert main(["generate", str(path), "--num_rows", "2"]) == 0
    *fit, train = _last_line(capsys)
    assert fit == ["fit", "--config", "conf/math.yaml"]
    assert yaml.safe_load(train.removeprefix("--data.init_args.train=")) == [{"path": str(path)}]


def test_pipe_gets_whole_lines(write_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_config(trainer__enable_progress_bar=None, trainer__default_root_dir=str(tmp_path / "run"))
    capfd.readouterr()
    assert main(["fit", "--config", str(config)]) == 0
    out = capfd.readouterr().out
    assert "\r" not in out
    assert "\x1b" not in out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert lines[-1].startswith("step 4 of 4, ")
    assert "exact_match" in lines[-1]


def test_bar_that_the_config_names_is_kept(
    write_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(trainer__enable_progress_bar=None, trainer__default_root_dir=str(tmp_path / "run"))
    capfd.readouterr()
    assert main(["fit", "--config", str(config), "--trainer.callbacks+=TQDMProgressBar"]) == 0
    out = capfd.readouterr().out
    assert "it/s" in out
    assert "step 4 of 4" not in out


def test_terminal_gets_a_bar(write_config: Config, tmp_path: Path) -> None:
    config = write_config(trainer__enable_progress_bar=None, trainer__default_root_dir=str(tmp_path / "run"))
    master, terminal = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-m", "looplm", "fit", "--config", str(config)]
    process = subprocess.Popen(command, stdout=terminal, stderr=subprocess.DEVNULL, env=environment)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(master, 2**16):
            shown += part
    except OSError:  # how a terminal ends on Linux
        pass
    os.close(master)
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b[" in text
    assert "Epoch 0" in text
    assert "/-2" not in text
    assert "step 4 of 4" not in text
