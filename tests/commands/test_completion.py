"""The script of `completion`, in a real shell."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from looplm.cli import main
from looplm.commands.names import LIGHTNING, OWN

# Calls the function that the shell would call for a word, as the shell would call it.
_COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
function=$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}" 2> /dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as patch, (folder / "looplm.bash").open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return folder / "looplm.bash"


def _completed(script: Path, *words: str) -> list[str]:
    command = ["bash", "-c", _COMPLETE, "bash", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_script_is_one_that_bash_can_read(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", [["looplm"], ["python", "-m", "looplm"], ["python3", "-m", "looplm"]])
def test_names_are_completed_however_the_program_is_called(script: Path, program: list[str]) -> None:
    assert set(_completed(script, *program, "")) == {*LIGHTNING, *OWN}
    assert _completed(script, *program, "fi") == ["fit"]
    assert _completed(script, *program, "fit", "--conf") == ["--config"]
    assert _completed(script, *program, "explore", "--max") == ["--max_depth", "--max_new_tokens", "--max_seconds"]


def test_values_and_files_are_completed(script: Path) -> None:
    (script.parent / "stars.yaml").touch()
    assert _completed(script, "looplm", "fit", "--config", "sta") == ["stars.yaml"]
    assert _completed(script, "looplm", "compare", "sta") == ["stars.yaml"]
    assert _completed(script, "looplm", "completion", "") == ["bash", "zsh"]
    placements = _completed(script, "looplm", "test", "--model.config.norm_placement", "sandwich")
    assert placements == ["sandwich_branch", "sandwich_dual"]


def test_other_calls_of_python_are_left_alone(script: Path) -> None:
    assert _completed(script, "python", "-m", "loop") == []
    assert _completed(script, "python", "fi") == []


def test_zsh_script_holds_the_same_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{name}:", out, re.M) for name in (*LIGHTNING, *OWN))
    assert "-->" not in out
    if shutil.which("zsh"):
        assert subprocess.run(["zsh", "-n"], input=out, text=True).returncode == 0


def test_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert "'fish'" in capsys.readouterr().err
