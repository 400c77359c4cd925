"""Wrong words on the command line end in one short line that names the nearest right one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.cli import main
from looplm.commands.messages import condense


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--model.config.width=abc", "`model.config.width` must be int, got abc"),
        ("--model.config.widht=3", "unknown option --model.config.widht; did you mean --model.config.width?"),
        ("--trainer.max_step=3", "unknown option --trainer.max_step; did you mean --trainer.max_steps?"),
        ("--data.init_args.max_digts=3", "unknown field max_digts; did you mean max_digits?"),
        ("--data.init_args.max_digits=12", "`digits` needs 1 <= min <= max <= 9, got 2 to 12."),
        (
            "--model.objective.depth_sampler=FixdDepth",
            "`model.objective.depth_sampler` must name a class, got FixdDepth; did you mean FixedDepth?",
        ),
        ("--data=Foo", "`data` must name a class, got Foo"),
        ("--model.optimizer.init_args.lr=nan", "`model.optimizer`: `lr` must be float, got nan"),
        ("--trainer.barebones=true", "`Trainer(barebones=True, logger=RunTensorBoard)` was passed."),
        (
            "--model.config.norm_type=rms_nrom",
            "`model.config.norm_type` must be one of layer_norm, rms_norm, simple_norm, got rms_nrom; "
            "did you mean rms_norm?",
        ),
        ("--trainer.precision=bf16mixed", "64, 32, 16, bf16, got bf16mixed; did you mean bf16-mixed?"),
        ("--trainer.precision=transformer-engine", "Requirement 'transformer_engine>=0.11.0' not met."),
        (
            "--model.objective.penalty={class_path: JacobianPenalty, init_args: {method: jvpp}}",
            "`method` must be one of finite_difference, jvp, vjp, auto, got jvpp; did you mean jvp?",
        ),
    ],
)
def test_the_line_names_field_value_and_what_was_meant(
    option: str, line: str, write_config, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(write_config()), option]) == 2
    errors = [text for text in capfd.readouterr().err.splitlines() if text.startswith("looplm: error:")]
    assert len(errors) == 1
    assert line in errors[0]
    assert "Union" not in errors[0]
    assert "Namespace" not in errors[0]


@given(st.text(max_size=80))
def test_other_words_pass_as_they_are(text: str) -> None:
    assert text.strip() in condense(text) or condense(text)


@pytest.mark.parametrize(
    ("argv", "name"), [("explore CKPT --prot 1", "--port"), ("compare a --otput x", "--output"), ("exits a --xyz", "")]
)
def test_a_misspelt_option_of_our_own_commands_gets_its_nearest_name(
    argv: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("looplm: error: unknown option --")
    assert (f"; did you mean {name}? (see" in line) if name else ("did you mean" not in line)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configs, and with nothing trained yet."""
    (tmp_path / "conf" / "study").mkdir(parents=True)
    for name in ("stars.yaml", "study/base.yaml", "study/pre_norm.yaml", "study/post_norm.yaml"):
        (tmp_path / "conf" / name).write_text("{}")
    (tmp_path / "runs" / "stars").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("completion bsh", "invalid choice: 'bsh' (choose from 'bash', 'zsh'); did you mean bash? (see"),
        ("exits runs/stars --cache lats", "k >= 1, got 'lats'; did you mean last? (see"),
        ("sweep conf/study --only pre_nrom", "got ['pre_nrom']; did you mean pre_norm?"),
        ("sweep conf/study --only pre_norm_seed0", "got ['pre_norm_seed0']; did you mean pre_norm?"),
        ("sweep conf/study --seeds 0 1 --only pre_norm_sed1", "did you mean pre_norm_seed1?"),
        ("fit --config conf/star.yaml", "file 'conf/star.yaml' does not exist; did you mean conf/stars.yaml?"),
        ("fit --config confs/stars.yml", "file 'confs/stars.yml' does not exist; did you mean conf?"),
        ("fit --config confs/stars.yaml", "file 'confs/stars.yaml' does not exist; did you mean conf/stars.yaml?"),
        ("compare runs/star", "run 'runs/star' does not exist; did you mean runs/stars?"),
        ("compare runs/abacus", "run 'runs/abacus' does not exist; `python -m looplm fit` and `test` make one."),
        ("exits runs/star", "is no config.yaml of a run: there is no such file; did you mean runs/stars?"),
        ("exits runs/abacus", "there is no such file; run `python -m looplm fit` first."),
        ("explore runs/star", "'runs/star' does not exist; did you mean runs/stars?"),
        ("explore ./abacus", "'./abacus' does not exist; `python -m looplm fit` makes a run."),
        ("explore conf/abacus", "'conf/abacus' does not exist; `python -m looplm fit` makes a run."),
    ],
)
def test_a_misspelt_value_or_file_gets_its_nearest_name(
    argv: str, line: str, reader: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error


def test_the_hub_is_not_asked_for_a_run_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # without a folder `runs`
    monkeypatch.setattr("looplm.commands.explorer.opening.load_model", lambda *_, **__: pytest.fail("asked"))
    assert main(["explore", "runs/stars"]) == 2
    assert "'runs/stars' does not exist; `python -m looplm fit` makes a run." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_before_fit_is_told_to_fit_first(
    command: str, write_config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    assert main([command, "--config", str(write_config()), f"--trainer.default_root_dir={root}"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    # The user has named no checkpoint.
    assert f"error: '{root}/checkpoints/last.ckpt' does not exist: run `fit` with the same config first" in error
    (tmp_path / "stars.ckpt").touch()
    assert main([command, "--config", str(write_config()), f"--ckpt_path={tmp_path}/strs.ckpt"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"got '{tmp_path}/strs.ckpt', which does not exist; did you mean {tmp_path}/stars.ckpt?" in error


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "eval"])
def test_long_helps_begin_with_usage_and_examples(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "eval":
        pytest.importorskip("lm_eval")
        monkeypatch.setattr(sys, "argv", sys.argv)  # the harness reads it, and the command sets it
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: python -m looplm {command} --")
    shown = lines[: lines.index("options:")]
    assert len(shown) <= 16
    assert sum(line.startswith(f"  python -m looplm {command} ") for line in shown) >= 1


def test_ctrl_c_ends_a_command_of_ours_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from looplm.commands import doctor

    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "looplm: interrupted\n"


def test_help_of_our_commands_tells_defaults_and_shows_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["exits", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "greatest depth of a token (default: 16)" in said
    assert "``" not in said
