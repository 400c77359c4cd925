"""The command line: what it does, what it writes, and how it refuses."""

from __future__ import annotations

import csv
import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import looplm
from looplm.cli import main

Config = Callable[..., Path]
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: its directory holds its config, checkpoints and validation curve."""
    from tiny_run import TINY

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert main(["fit", "--config", str(folder / "tiny.yaml"), f"--trainer.default_root_dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must end in one clear line and exit code 2; return the line."""

    def run(*argv: str) -> str:
        capfd.readouterr()
        code = main([str(argument) for argument in argv])
        captured = capfd.readouterr()
        # Lightning's notices may come before it, but nothing that looks like a second error.
        lines = [line for line in captured.err.splitlines() if line.startswith("looplm: error: ")]
        assert code == 2, captured.err
        assert len(lines) == 1, captured.err
        assert captured.err.endswith(lines[0] + "\n")
        assert "Traceback" not in captured.err
        assert "usage:" not in captured.err
        return lines[0].removeprefix("looplm: error: ")

    return run


def _python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


def _curve(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# What the commands do.


def test_fit_leaves_config_checkpoint_curve_and_logs_in_the_run_directory(trained: Path) -> None:
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"last.ckpt", "epoch=0-step=4.ckpt"}
    assert [row["depth"] for row in _curve(trained / "val_curve.csv")] == ["1", "4"]
    assert (trained / "val_curve.png").read_bytes().startswith(b"\x89PNG")
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert saved["model"]["config"]["width"] == 16
    assert saved["trainer"]["default_root_dir"] == str(trained)
    events = EventAccumulator(str(trained))
    events.Reload()
    assert {"train/loss", "train/depth", "val/exact_match/depth_00004"} <= set(events.Tags()["scalars"])
    assert "epoch" not in events.Tags()["scalars"]  # 0 throughout


def test_saved_config_repeats_the_run(trained: Path, tmp_path: Path) -> None:
    # What a user is told to do next: the resolved config stands for the original one.
    argv = ["fit", "--config", str(trained / "config.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    assert main(argv) == 0
    first, second = (
        torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for root in (trained, tmp_path)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_test_writes_the_curve_of_the_last_checkpoint(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["test", "--config", str(trained / "config.yaml")]) == 0
    rows = _curve(trained / "test_curve.csv")
    assert [row["depth"] for row in rows] == ["0", "2", "8"]
    assert all(0 <= float(row["exact_match"]) <= float(row["token_accuracy"]) <= 1 for row in rows)
    best = max(rows, key=lambda row: float(row["exact_match"]))
    said = f"exact match on test: at best {100 * float(best['exact_match']):.1f} % (depth {best['depth']})"
    assert said in caplog.text


def test_validate_reproduces_the_curve_of_training(trained: Path) -> None:
    before = _curve(trained / "val_curve.csv")
    assert main(["validate", "--config", str(trained / "config.yaml")]) == 0
    assert _curve(trained / "val_curve.csv") == before


def test_evaluation_leaves_config_and_checkpoint_alone(trained: Path) -> None:
    kept = [trained / "config.yaml", trained / "checkpoints" / "last.ckpt"]
    before = [path.stat().st_mtime_ns for path in kept]
    assert main(["test", "--config", str(trained / "config.yaml"), "--model.test_depths=[1]"]) == 0
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_options_override_the_config(trained: Path) -> None:
    argv = ["test", "--config", str(trained / "config.yaml"), "--model.test_depths=[3,5]", "--data.num_test=7"]
    assert main(argv) == 0
    assert [row["depth"] for row in _curve(trained / "test_curve.csv")] == ["3", "5"]
    assert '"num_samples": 7' in (trained / "test_summary.json").read_text()


@pytest.mark.filterwarnings("ignore:.*different test problems were drawn")
def test_further_test_sets_get_curves_of_their_own(trained: Path) -> None:
    argv = ["test", "--config", str(trained / "config.yaml"), "--data.test_digits=[1]", "--data.num_test=4"]
    assert main(argv) == 0
    assert {row["split"] for row in _curve(trained / "test_curve.csv")} == {"test", "digits_1"}


def test_predict_writes_the_answers_and_nothing_else_to_stdout(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "problems").write_text("12+34\n\n 5 + 67 =\n")
    argv = ["predict", "--config", str(trained / "config.yaml"), f"--data.predict_file={tmp_path / 'problems'}"]
    capfd.readouterr()
    assert main(argv) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("=")[0] for line in lines] == ["12+34", "5+67"]


def test_predict_reads_standard_input_and_leaves_the_run_directory_alone(trained: Path) -> None:
    before = sorted(path.name for path in trained.iterdir())
    argv = ["-m", "looplm", "predict", "--config", str(trained / "config.yaml")]
    done = _python(*argv, input="12+34\n99+1\n")
    assert done.returncode == 0, done.stderr
    assert [line.split("=")[0] for line in done.stdout.splitlines()] == ["12+34", "99+1"]
    assert sorted(path.name for path in trained.iterdir()) == before


def test_two_processes_write_the_curve_of_one(trained: Path, tmp_path: Path) -> None:
    # 21 samples on two ranks: the distributed sampler repeats one.
    last = trained / "checkpoints" / "last.ckpt"
    argv = ["test", "--config", str(trained / "config.yaml"), f"--ckpt_path={last}", "--data.num_test=21"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*argv, f"--trainer.default_root_dir={one}"]) == 0
    parallel = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.default_root_dir={two}"]
    done = _python("-m", "looplm", *argv, *parallel)
    assert done.returncode == 0, done.stderr
    assert _curve(two / "test_curve.csv") == _curve(one / "test_curve.csv")
    assert '"num_samples": 21' in (two / "test_summary.json").read_text()


# Help and start-up.


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "compare", "sweep"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_examples_of_the_help_parse(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(looplm.__file__).parents[1])
    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = re.findall(rf"^  python -m looplm ({command} .*)$", capsys.readouterr().out, re.M)
    assert examples
    for example in examples:
        with pytest.raises(SystemExit) as ended:
            main([*example.split(), "--print_config"])
        assert ended.value.code == 0


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", out, re.M) for command in ("fit", "test", "predict", "compare", "sweep"))


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"looplm {looplm.__version__}\n"


def test_help_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['looplm']\n"
        "try: runpy.run_module('looplm', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = _python("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m looplm COMMAND")


def test_commands_that_train_nothing_do_not_wait_for_lightning() -> None:
    names = ["compare", "export", "generate", "import_", "sweep"]
    code = f"import sys; from looplm.commands import {', '.join(names)}; assert 'lightning' not in sys.modules"
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr


def test_error_of_a_real_process_is_one_line_with_exit_code_2() -> None:
    done = _python("-m", "looplm", "fit", "--config", "no/such.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"looplm: error: .*no/such\.yaml.*\n", done.stderr)


# Refusals. Each is one line on stderr that begins with `looplm: error:`, exit code 2, no traceback (fixture `fails`).


def test_unknown_command_is_refused_with_the_known_ones(fails: Fails) -> None:
    assert "'train'" in (line := fails("train"))
    assert "fit" in line


@pytest.mark.parametrize(
    ("option", "named"),
    [
        pytest.param("--model.config.widht=16", "widht", id="misspelt"),
        pytest.param("--trainer.max_step=1", "max_step", id="abbreviated"),
        pytest.param("--model.config.wid=16", "wid", id="abbreviated-nested"),
        pytest.param("--data.batch_siz=1", "batch_siz", id="abbreviated-in-a-class"),
        pytest.param("--model.config.width=wide", "width", id="not-a-number"),
        pytest.param("--model.config.num_heads=3", "`num_heads` must divide `width` (16), got 3", id="heads"),
        pytest.param("--model.config.norm_placement=middle", "norm_placement", id="norm-placement"),
        pytest.param("--model.objective.penalty_weight=1.5", "`penalty_weight` (λ) must be in [0, 1], got 1.5", id="λ"),
        pytest.param("--model.objective.penalty_weight=0.1", "`penalty` and `penalty_weight`", id="no-penalty"),
        pytest.param(
            "--model.objective.depth_sampler.init_args.min_depth=9", "`max_depth` must be >= `min_depth`", id="depths"
        ),
        pytest.param("--model.objective.depth_sampler=NoSuchDepth", "NoSuchDepth", id="no-such-class"),
        pytest.param("--model.test_depths=[]", "`test_depths`", id="no-test-depths"),
        pytest.param("--model.val_depths=[4,2]", "`val_depths`", id="unordered-depths"),
        pytest.param("--model.lr_schedule.min_ratio=2", "`min_ratio`", id="lr-schedule"),
        pytest.param("--seed_everything=-1", "`seed_everything` must be an integer from 0", id="seed"),
        pytest.param("--data.operations=['/']", "`operations`", id="operation"),
        pytest.param("--data.min_digits=5", "`digits`", id="digits"),
        pytest.param("--data.template={a}{op}{b}", "`template`", id="template"),
        pytest.param("--trainer.max_steps=many", "max_steps", id="trainer"),
        pytest.param("--trainer.accelerator=abacus", "abacus", id="accelerator"),
        pytest.param("--trainer.precision=3", "precision", id="precision"),
        pytest.param("--trainer.max_steps=-7", "max_steps", id="trainer-range"),
        pytest.param("--trainer.max_steps=-1", "`trainer.max_steps` must be >= 1", id="no-last-step"),
        pytest.param("--seed_everything=4294967296", "`seed_everything` must be an integer from 0", id="large-seed"),
        pytest.param("--trainer.val_check_interval=0", "`trainer.val_check_interval` must be > 0", id="interval"),
        pytest.param("--trainer.accumulate_grad_batches=0", "`trainer.accumulate_grad_batches`", id="accumulation"),
        pytest.param("--trainer.limit_train_batches=0", "`trainer.limit_train_batches` must be > 0", id="no-batches"),
        pytest.param("--trainer.gradient_clip_val=-1", "`trainer.gradient_clip_val` must be >= 0, got -1", id="clip"),
        pytest.param("--model.optimizer={class_path: Adam, init_args: {lr: -1}}", "`model.optimizer`", id="rate"),
        pytest.param("--model.optimizer={class_path: MuonAdamW, init_args: {lr: -1}}", "`model.optimizer`", id="muon"),
        pytest.param("--curve.mean_depth=-1", "`mean_depth` must be > 0, got -1", id="mean-depth"),
        pytest.param("--data.digit_stages=[]", "`digit_stages`", id="no-stages"),
        pytest.param("--checkpoint.save_top_k=-5", "save_top_k", id="checkpoint"),
        pytest.param("--trainer.val_check_interval=0.5", "val_check_interval", id="fraction-of-an-endless-stream"),
    ],
)
def test_bad_option_is_refused_by_name(
    write_config: Config, tmp_path: Path, fails: Fails, option: str, named: str
) -> None:
    line = fails("fit", "--config", write_config(), f"--trainer.default_root_dir={tmp_path / 'run'}", option)
    assert named in line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model.config.widht", 16, "widht"),
        ("modle", {"config": {"width": 16}}, "modle"),
        ("trainer.max_step", 3, "max_step"),
        ("data.init_args.batchsize", 3, "batchsize"),
        ("model.objective.depth_sampler.init_args.deepest", 3, "deepest"),
        ("model.config.width", "wide", "width"),
        ("model.config.dropout", 1.0, "`dropout`"),
        ("seed_everything", -1, "`seed_everything`"),
    ],
)
def test_bad_key_in_yaml_is_refused_by_name(
    write_config: Config, tmp_path: Path, fails: Fails, key: str, value: Any, named: str
) -> None:
    config = write_config(**{key.replace(".", "__"): value})
    assert named in fails("fit", "--config", config, f"--trainer.default_root_dir={tmp_path / 'run'}")


def test_missing_config_is_refused_by_path(fails: Fails) -> None:
    assert "no/such.yaml" in fails("fit", "--config", "no/such.yaml")


@pytest.mark.parametrize("content", [b"model: [1,\n", b"\x80\x81", b"just text\n", b"- a\n- b\n", b""])
def test_config_that_is_no_yaml_mapping_is_refused_by_path(tmp_path: Path, fails: Fails, content: bytes) -> None:
    (tmp_path / "broken.yaml").write_bytes(content)
    assert f"config {str(tmp_path / 'broken.yaml')!r}" in fails("fit", "--config", tmp_path / "broken.yaml")


def test_a_run_without_data_is_told_of_config(fails: Fails) -> None:
    assert "name a config with `--config`" in fails("fit")


def test_directory_as_config_is_refused(tmp_path: Path, fails: Fails) -> None:
    assert str(tmp_path) in fails("fit", "--config", tmp_path)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_bad_row_of_a_data_file_is_refused_by_file_and_line(
    write_config: Config, tmp_path: Path, fails: Fails, trained: Path, command: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1, "op": "+", "b": 2, "answer": 3}\n{"a": 1, "op": "+", "b": 2, "answer": 4}\n')
    line = fails(command, "--config", trained / "config.yaml", f"--data.test_file={rows}")
    assert f"{rows}, line 2: 1+2 is not 4" in line


def test_bad_line_to_predict_is_refused_by_file_and_line(tmp_path: Path, fails: Fails, trained: Path) -> None:
    (tmp_path / "problems").write_text("1+2\nnonsense\n")
    line = fails("predict", "--config", trained / "config.yaml", f"--data.predict_file={tmp_path / 'problems'}")
    assert f"{tmp_path / 'problems'}, line 2: " in line


def test_log_directory_that_cannot_be_written_is_refused_before_training(
    write_config: Config, tmp_path: Path, fails: Fails
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"  # below a regular file: not even root can make it
    assert f"`trainer.default_root_dir` must be a folder that can be written, got '{folder}'" in fails(
        "fit", "--config", write_config(), f"--trainer.default_root_dir={folder}"
    )


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_into_a_directory_that_cannot_be_written_is_refused(
    write_config: Config, tmp_path: Path, fails: Fails, trained: Path, command: str
) -> None:
    (tmp_path / "file").write_text("")
    options = [
        f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}",
        f"--trainer.default_root_dir={tmp_path / 'file' / 'x'}",
    ]
    assert "`trainer.default_root_dir`" in fails(command, "--config", write_config(), *options)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_missing_checkpoint_is_refused_by_path(
    write_config: Config, fails: Fails, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "none.ckpt"
    options = [f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert f"got '{path}', which does not exist" in fails(command, "--config", write_config(), *options)


def test_evaluation_without_a_run_is_refused_by_the_checkpoint_it_lacks(
    write_config: Config, fails: Fails, tmp_path: Path
) -> None:
    line = fails("test", "--config", write_config(), f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert str(tmp_path / "run" / "checkpoints" / "last.ckpt") in line


@pytest.mark.parametrize("command", ["fit", "test"])
def test_checkpoint_of_another_architecture_is_refused_by_field(
    trained: Path, tmp_path: Path, fails: Fails, command: str
) -> None:
    line = fails(
        command,
        *("--config", trained / "config.yaml", f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"),
        *(
            "--model.config.norm_placement=pre_norm",
            "--model.config.width=32",
            f"--trainer.default_root_dir={tmp_path}",
        ),
    )
    assert "`norm_placement` 'sandwich_dual' there, 'pre_norm' here" in line
    assert "`width` 16 there, 32 here" in line


class _Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({self.path!r}, 'w').write('ran')",)


def _truncated(good: bytes, folder: Path) -> bytes:
    return good[: len(good) // 2]


def _flipped_bytes(good: bytes, folder: Path) -> bytes:
    """Flip bits of one tensor's data, where only a checksum can tell."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        largest = max(
            (item for item in archive.infolist() if "/data/" in item.filename), key=lambda item: item.file_size
        )
        content = archive.read(largest)
    position = good.index(content) + len(content) // 2
    return good[:position] + bytes(byte ^ 0xFF for byte in good[position : position + 4]) + good[position + 4 :]


def _text(good: bytes, folder: Path) -> bytes:
    return b"this is no checkpoint\n"


def _empty(good: bytes, folder: Path) -> bytes:
    return b""


def _hostile_pickle(good: bytes, folder: Path) -> bytes:
    return pickle.dumps({"state_dict": _Payload(str(folder / "ran")), "hyper_parameters": {}})


def _hostile_archive(good: bytes, folder: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"state_dict": {}, "hyper_parameters": _Payload(str(folder / "ran"))}, content)
    return content.getvalue()


def _other_content(good: bytes, folder: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"weights": torch.zeros(2)}, content)
    return content.getvalue()


def _other_type(good: bytes, folder: Path) -> bytes:
    content = io.BytesIO()
    torch.save(torch.zeros(2), content)
    return content.getvalue()


def _without_a_tensor(good: bytes) -> bytes:
    content = io.BytesIO()
    checkpoint = torch.load(io.BytesIO(good), weights_only=True)
    del checkpoint["state_dict"]["model.final_norm.weight"]
    torch.save(checkpoint, content)
    return content.getvalue()


def _weights_alone(good: bytes) -> bytes:
    """What ModelCheckpoint's ``save_weights_only`` keeps."""
    content = io.BytesIO()
    checkpoint = torch.load(io.BytesIO(good), weights_only=True)
    for name in ("optimizer_states", "lr_schedulers"):
        del checkpoint[name]
    torch.save(checkpoint, content)
    return content.getvalue()


DAMAGES = [
    _truncated,
    _flipped_bytes,
    _text,
    _empty,
    _hostile_pickle,
    _hostile_archive,
    _other_content,
    _other_type,
]


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_and_never_run(
    trained: Path, tmp_path: Path, fails: Fails, command: str, damage: Callable[[bytes, Path], bytes]
) -> None:
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(damage((trained / "checkpoints" / "last.ckpt").read_bytes(), tmp_path))
    options = [f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert str(path) in fails(command, "--config", trained / "config.yaml", *options)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(trained: Path, tmp_path: Path, fails: Fails) -> None:
    path = tmp_path / "lacking.ckpt"
    path.write_bytes(_without_a_tensor((trained / "checkpoints" / "last.ckpt").read_bytes()))
    assert "'model.final_norm.weight'" in fails("test", "--config", trained / "config.yaml", f"--ckpt_path={path}")


def test_weights_without_training_state_can_be_tested_but_not_resumed(
    trained: Path, tmp_path: Path, fails: Fails
) -> None:
    path = tmp_path / "weights.ckpt"
    path.write_bytes(_weights_alone((trained / "checkpoints" / "last.ckpt").read_bytes()))
    argv = ["--config", str(trained / "config.yaml"), f"--ckpt_path={path}", f"--trainer.default_root_dir={tmp_path}"]
    assert "optimizer_states" in fails("fit", *argv)
    assert main(["test", *argv]) == 0


def test_hostile_payload_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    # Else the test above could not fail.
    pickle.loads(_hostile_pickle(b"", tmp_path))
    assert (tmp_path / "ran").exists()
