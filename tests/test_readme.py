"""Every command and every example of the README, and of CONTRIBUTING, does what a reader will do with it.

What is cheap is run, in the order of the page and in one folder, with options that make it small. What needs GPUs, the
hub or hours is parsed: config and options must be whole and known. A command of another kind fails the test, so that
none is added which nobody has tried.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from itertools import dropwhile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp

import looplm
from looplm.checkpoints import save_pretrained
from looplm.cli import main
from looplm.commands import exits, sweep
from looplm.commands.names import LIGHTNING, OWN
from looplm.commands.rows import read_rows
from looplm.commands.runs import expand_runs
from looplm.config import LoopedConfig
from looplm.errors import InputError
from looplm.model import LoopedTransformer

ROOT = Path(looplm.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(match[1], match[2]) for match in FENCED.finditer(README)]
EXAMPLES = [code for language, code in BLOCKS if language == "python"]
SUBCOMMANDS = {**LIGHTNING, **OWN}
PROGRAMS = "|".join(["python", "pytest", "make", "pip", "pre-commit", "tensorboard", "torchrun", *SUBCOMMANDS])


def listed_commands(page: str) -> list[str]:
    """Return the commands in a page's blocks; one may go on after a backslash."""
    return [
        re.sub(r"\s+#.*", "", line)
        for match in FENCED.finditer(page)
        if match[1] in ("", "bash")
        for line in match[2].replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]


def inline(page: str) -> list[str]:
    """Return what stands in a page's text as code; it may go over the end of a line."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", FENCED.sub("", page))]


def commands_of(page: str) -> list[str]:
    """Return a page's commands. A lone `torchrun` or `sweep` is a name, and none."""
    in_text = [text for text in inline(page) if re.match(rf"(\.venv/bin/)?({PROGRAMS})\s", text)]
    # Those of the lists come first: they make the runs that the others read.
    return list(dict.fromkeys([*listed_commands(page), *in_text]))


OPTIONS = list(dict.fromkeys(text for text in inline(README) if re.match(r"--(model|data|trainer)\.", text)))

SMALL = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--trainer.num_sanity_val_steps=0", "--model.config.width=16", "--model.config.num_heads=2"),
    *("--model.config.ffn_width=16", "--model.val_depths=[1,2]", "--model.test_depths=[0,3]"),
    *("--data.init_args.batch_size=8", "--data.init_args.eval_batch_size=8"),
    *("--data.init_args.num_val=8", "--data.init_args.num_test=16"),
]
# tests/test_math_configs.py and tests/scale run the configs behind these on stand-ins and on two processes.
LARGE = ("math", "overlays/", "num_nodes", "stars_plus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like the repository's, with small models in the place of published and of sharded ones."""
    path = tmp_path_factory.mktemp("reader")
    for name in ("conf", "tests", "looplm", "Makefile", "pyproject.toml", "constraints.txt", ".ci"):
        (path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "data", path / "data")
    config = LoopedConfig.ouro_1_4b()
    config = replace(config, vocab_size=97, max_positions=96, width=16, num_heads=2, ffn_width=16, num_core_layers=1)
    torch.manual_seed(0)
    save_pretrained(LoopedTransformer(config), path / "ByteDance" / "Ouro-1.4B", num_loops=4)
    sharded = path / "runs" / "sharded" / "checkpoints" / "last.ckpt"
    dcp.save({"state_dict": {"weight": torch.arange(3.0)}}, checkpoint_id=sharded, no_dist=True)
    torch.save({"global_step": 7}, sharded / "meta.pt")
    before = Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)


def _lightning(argv: list[str]) -> None:
    if "--print_config" in argv or any(word in argument for word in LARGE for argument in argv):
        with pytest.raises(SystemExit) as ended:
            main([*argv, "--print_config"])
        assert ended.value.code == 0
    else:
        assert main([*argv, *SMALL]) == 0


def _sweep(argv: list[str]) -> None:
    """Hours of training: the runs must be there to start, and those with a file of rows must stand in it."""
    args, options = sweep.parse(argv)
    runs = expand_runs(args.configs, root=args.root, options=options, seeds=args.seeds, only=args.only)
    assert runs
    for one in (runs[0], runs[-1]):  # tests/test_configs.py has them all
        _lightning(["fit", *one.arguments, "--print_config"])
    if args.rows is not None:
        known = read_rows(args.rows)
        assert [run.name for run in runs if (run.name, run.stamp["config_sha256"]) not in known] == []


def _looplm(argv: list[str], capfd: Any) -> None:
    command, *rest = argv
    if command in ("fit", "validate", "test", "predict"):
        _lightning(argv)
    elif command == "sweep":
        _sweep(rest)
    elif command == "eval":
        pytest.importorskip("lm_eval")
        from lm_eval._cli.harness import HarnessCLI

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["lm_eval", "run", *rest])  # which is what the harness reads
            args = HarnessCLI().parse_args()
        assert args.model == "looplm"
        assert Path(args.model_args["pretrained"]).is_dir()
    elif command == "generate":
        assert main([*argv, "--num_rows", "20"]) == 0
        assert len(Path(rest[0]).read_text().splitlines()) == 20
    elif command == "explore":  # it serves until it is stopped: tests/commands/test_explore_server.py
        assert Path(rest[0]).is_dir()
        with pytest.raises(SystemExit) as ended:
            main([*argv, "--help"])
        assert ended.value.code == 0
    elif command == "exits":
        args = exits.make_parser().parse_args(rest)
        if args.run.is_dir():
            assert main([*argv, "--num_loops", "2"]) == 0
        else:  # a run of a sweep that nobody has made here
            name, _, seed = args.run.name.rpartition("_seed")
            assert seed.isdigit()
            assert Path("conf", args.run.parent.name, f"{name}.yaml").is_file()
    else:
        assert main(argv) == 0
    if command == "predict" and not any("math" in word for word in argv):
        assert capfd.readouterr().out.startswith("123+456=")


def _torchrun(argv: list[str], capfd: Any) -> None:
    from torch.distributed.run import parse_args

    args = parse_args(argv)
    assert args.module
    assert args.nproc_per_node == "8"
    _check([sys.executable, "-m", args.training_script, *args.training_script_args], capfd)


def _pip(argv: list[str]) -> None:
    """Building takes an environment, which .ci/run makes; here what is asked for must exist."""
    assert argv[0] == "install"
    (target,) = argv[1:]
    folder, extras = re.fullmatch(r"(.+)\[(.+)\]", target).groups()
    project = tomllib.loads((Path(folder) / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def _pytest(argv: list[str]) -> None:
    """The files must be there, and a mark one that the project has."""
    paths = [word for word in argv if word.endswith(".py")]
    for path in paths:
        _script(path)
    if "-m" in argv:
        marks = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        assert argv[argv.index("-m") + 1] in [mark.split(":")[0] for mark in marks]
    assert paths or "-m" in argv


def _script(path: str) -> None:
    """Measurements of minutes: the script must be there and be able to start."""
    compile(Path(path).read_text(), path, "exec")


def _check(words: list[str], capfd: Any) -> None:
    program, *argv = words
    program = Path(program).name or program  # a lone dot is no path's name
    if program == "srun":
        _check([*dropwhile(lambda word: word.startswith("--"), argv)], capfd)
    elif program == ".":
        (script,) = argv
        assert f"VENV := {Path(script).parents[1]}\n" in Path("Makefile").read_text()
        assert Path(script).parts[1:] == ("bin", "activate")
    elif program.startswith("python") and argv[:2] == ["-m", "looplm"]:
        _looplm(argv[2:], capfd)
    elif program in SUBCOMMANDS:
        _looplm([program, *argv], capfd)
    elif program == "python" and argv[:2] == ["-m", "pytest"]:
        _pytest(argv[2:])
    elif program == "python" and argv[0].startswith("tests/"):
        _script(argv[0])
    elif program == "python" and argv[0] == "-m" and argv[1].startswith("tests."):
        module = Path(*argv[1].split("."))
        _script(str(module / "__main__.py" if module.is_dir() else module.with_suffix(".py")))
    elif program == "torchrun":
        _torchrun(argv, capfd)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *argv], check=True, capture_output=True)
    elif program == "pip":
        _pip(argv)
    elif program == "pytest":
        _pytest(argv)
    elif program == "pre-commit":
        assert argv == ["install"]  # tests/test_project_files.py reads its hooks
    elif words == [".ci/run"]:
        assert os.access(words[0], os.X_OK)
    elif program == "tensorboard":
        from tensorboard.program import TensorBoard

        TensorBoard().configure((program, *argv))
        assert any(Path(argv[-1]).rglob("events.out.tfevents.*"))
    else:
        raise AssertionError(f"a command of a kind that is not tested: {shlex.join(words)}")


def test_the_pages_have_commands_and_examples() -> None:
    assert len(listed_commands(README)) >= 20
    assert len(listed_commands(CONTRIBUTING)) >= 4
    assert len(EXAMPLES) >= 3


def test_a_command_in_the_text_is_found_however_it_begins() -> None:
    text = "see `exits\nruns/a`, `sweep`, `.venv/bin/python -m pytest`, `eval --tasks x`\n```\nfit \\\n --a  # b\n```\n"
    assert commands_of(text) == ["fit   --a", "exits runs/a", ".venv/bin/python -m pytest", "eval --tasks x"]


def test_commands(folder: Path, subtests: pytest.Subtests, capfd: pytest.CaptureFixture[str]) -> None:
    """They are one test: each finds what those before it wrote, however tests are spread over processes."""
    for command in commands_of(README):
        with subtests.test(command), pytest.MonkeyPatch.context() as patch:
            capfd.readouterr()  # what the one before it printed
            said, _, rest = command.rpartition(" | ")
            if said:
                assert said.startswith("echo ")
                patch.setattr(sys, "stdin", io.StringIO(said.removeprefix("echo ") + "\n"))
            _check(shlex.split(rest), capfd)


@pytest.mark.parametrize("command", commands_of(CONTRIBUTING))
def test_command_of_contributing(command: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _check(shlex.split(command.replace("NAME", "pre_norm_layer_norm")), capfd)


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, folder: Path) -> None:
    _lightning(["fit", "--config", "conf/stars.yaml", *shlex.split(option), "--print_config"])


def test_dynamics_come_with_the_callback(folder: Path) -> None:
    (option,) = [option for option in OPTIONS if "callbacks" in option]
    root = folder / "dynamics"
    cheap = {"depths": "[1,2]", "num_products": 2, "num_samples": 2, "with_figures": "false"}
    small = [
        *SMALL,
        "--trainer.max_steps=1",
        *(f"--trainer.callbacks.{name}={value}" for name, value in cheap.items()),
    ]
    assert main(["fit", "--config", "conf/stars.yaml", option, *small, f"--trainer.default_root_dir={root}"]) == 0
    assert (root / "val_dynamics.csv").is_file()


@pytest.mark.parametrize(
    "line",
    [
        *("rm -rf /", "python -m looplm tarin", "make nothing", "pip install 'none[x]'", ". venv/bin/activate"),
        *("exits runs/study/none_seed0", "sweep conf/study --only pre_norm_layer_norm_seed0"),
    ],
)
def test_a_command_that_nobody_could_run_is_found(line: str, folder: Path, capfd: Any) -> None:
    with pytest.raises((AssertionError, subprocess.CalledProcessError, OSError, InputError)):
        _check(shlex.split(line), capfd)


@pytest.mark.parametrize("code", [code for code in EXAMPLES if "# +" not in code])
def test_example(code: str, folder: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    if "tokens" in names:
        assert names["tokens"].shape[0] == 2


def test_the_ten_lines_give_a_foreign_project_curve_and_dynamics(folder: Path) -> None:
    import runpy

    (code,) = [code for code in EXAMPLES if "# +" in code]
    path = ROOT / "tests" / "foreign" / "implicit_classifier.py"
    theirs = runpy.run_path(str(path))
    names = {**theirs, "callbacks": []}
    exec(compile(code, "README.md", "exec"), names)
    # The lines are those of the project: only annotations are left out.
    whole = textwrap.dedent(path.read_text())
    lines = [line.strip() for line in code.splitlines() if line.endswith("# +")]
    assert len(lines) == 10
    assert all(line in whole for line in lines if not line.startswith("def "))

    class Whole(names["ImplicitClassifier"], theirs["ImplicitClassifier"]):
        """The README's methods on the project's encoder, cell and head."""

    trainer = L.Trainer(
        default_root_dir=folder / "classifier",
        accelerator="cpu",
        max_steps=2,
        callbacks=names["callbacks"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(theirs["make_images"](16, 0), batch_size=8)
    trainer.fit(Whole(), loader, loader)
    assert {"val_curve.csv", "val_dynamics.csv"} <= {path.name for path in (folder / "classifier").iterdir()}
