"""Wrong words on the command line end in one short line that names the nearest right one."""

from __future__ import annotations

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
