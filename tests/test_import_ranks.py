"""Imports go from high ranks to low ones, so that every file can be understood from those below it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import looplm

PACKAGE = Path(looplm.__file__).parent
# The most specific name counts. What nothing may depend on stands highest.
RANKS = {
    "errors": -2,
    "randomness": -1,
    "untrusted": -1,
    "loop": 0,
    "lr_schedule": 0,
    "config": 0,
    "cache": 0,
    "compilation": 0,
    "shards": 0,
    "families": 1,
    "flops": 1,
    "origin": 1,
    "carried_tokenizer": 2,
    "pretrained_folder": 2,
    "exits": 0,
    "sampling": 0,
    "scoring": 1,
    "depth": 0,
    "stability": 0,
    "dynamics": 1,
    "layers": 1,
    "metrics": 1,
    "figures": 0,
    "state_figures": 1,
    "group_figures": 1,
    "corpora": 1,
    "model": 2,
    "callbacks": 2,
    "decoding": 2,
    "optimizers": 0,
    "objective": 3,
    "generation": 3,
    "checkpoints": 3,
    "durable": -1,
    "checkpoint_io": 1,
    "sharded_checkpoints": 0,
    "strategy": 2,
    "parallel": 1,
    "inspection": 4,
    "module": 4,
    "harness": 4,
    "commands": 5,
    "cli": 6,
    "__main__": 7,
}
SIDEWAYS = {"families", "stability", "corpora", "callbacks", "commands"}

# `__init__` is exempt: it names everything and imports nothing until it is asked.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _imports(path: Path) -> list[str]:
    """Return the absolute names that a file imports anywhere, also inside functions."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            base = node.module or ""
            # `from looplm import x` may name a module.
            found += [f"{base}.{alias.name}" for alias in node.names] if base == "looplm" else [base]
        # importlib.import_module("looplm.…") counts as well; an f-string's beginning is enough.
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found += [
                str(part.value).rstrip(".")
                for part in ast.walk(node.args[0])
                if isinstance(part, ast.Constant) and str(part.value).startswith("looplm.")
            ]
    return found


def _own(path: Path) -> set[str]:
    """Return the imported modules of this package, without its prefix; a class's home in place of its lazy name."""
    homes = {f"looplm.{name}": home for name, home in looplm._HOME.items()}
    names = {homes.get(name, name) for name in _imports(path)}
    modules = {name.removeprefix("looplm.") for name in names if name.startswith("looplm.")}
    return {module for module in modules if not module.startswith("__version__")}


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_file_imports_lower_ranks_only(path: Path) -> None:
    here = _module(path)
    package = here.split(".")[0]
    assert package in RANKS, f"{here} has no rank"
    for other in sorted(_own(path)):
        above = other.split(".")[0]
        assert above in RANKS, f"{here} imports {other}, which has no rank"
        if above == package and package in SIDEWAYS:
            continue
        assert RANKS[above] < RANKS[package], f"{here} (rank {RANKS[package]}) imports {other} (rank {RANKS[above]})"


def test_no_cycle_inside_a_package() -> None:
    graph = {_module(path): {name for name in _own(path) if "." in name} for path in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path, name])
        if name not in done:
            for other in graph.get(name, set()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_figures_imports_matplotlib() -> None:
    drawing = [_module(path) for path in FILES if any(name.startswith("matplotlib") for name in _imports(path))]
    assert drawing == ["figures"]


@pytest.mark.parametrize(
    ("package", "unknown"),
    [
        # They plug into any project.
        ("callbacks", {"module", "model", "config", "objective", "layers", "generation"}),
        # It takes callables.
        ("stability", {"loop", "model", "layers", "module"}),
        # The science knows no trainer.
        ("objective", {"model", "layers", "module", "lightning"}),
        ("generation", {"model", "layers", "module", "lightning"}),
        ("scoring", {"model", "layers", "cache", "generation", "lightning"}),
        ("decoding", {"model", "layers", "cache", "module", "lightning"}),
        ("model", {"objective", "corpora", "lightning"}),
    ],
)
def test_file_does_not_know_what_its_docstring_denies(package: str, unknown: set[str]) -> None:
    files = [path for path in FILES if _module(path).split(".")[0] == package]
    assert files
    for path in files:
        roots = {name.split(".")[0] for name in _own(path)} | {name.split(".")[0] for name in _imports(path)}
        assert not roots & unknown, _module(path)


def test_callbacks_know_of_corpora_only_how_answers_are_graded() -> None:
    files = [path for path in FILES if _module(path).split(".")[0] == "callbacks"]
    known = {name for path in files for name in _own(path) if name.split(".")[0] == "corpora"}
    # Text in, verdict out: no DataModule, no tokenizer.
    assert known <= {"corpora.extraction", "corpora.grading", "corpora.votes"}


@pytest.mark.parametrize("name", looplm.__all__)
def test_public_name_can_be_imported_and_is_public_where_it_lives(name: str) -> None:
    home = importlib.import_module(looplm._HOME[name])
    assert getattr(looplm, name) is getattr(home, name)
    assert name in home.__all__
    assert name in dir(looplm)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchName"):
        looplm.NoSuchName  # noqa: B018


def test_importing_the_package_is_silent_and_loads_nothing_heavy() -> None:
    code = "import sys, looplm; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
