"""Every public name says what it is and shows it in an example, which runs as a doctest."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from fnmatch import fnmatchcase
from typing import Any

import pytest

import looplm

# Names that need no example, and why; * stands for any module.
WITHOUT_EXAMPLE = {
    **dict.fromkeys(
        (
            "looplm.commands.*.make_parser",
            "looplm.commands.*.run",
            "looplm.commands.arguments.Parser",
            "looplm.commands.sweep.parse",
        ),
        "the command line is their user: --help documents them, tests/test_readme.py runs them",
    ),
    "looplm.callbacks.dynamics_report.dynamics_figures": "LatentDynamicsMonitor is its user; each figure has one",
    **dict.fromkeys(
        (
            "looplm.corpora.evaluation_rows.EvaluationRows",
            "looplm.corpora.learnt_tokenizer.learn_once",
            "looplm.corpora.streamed.StreamedOrder",
            "looplm.corpora.token_table.TokenTable",
            "looplm.corpora.token_table.prompts_that_change",
            "looplm.corpora.training_order.TrainingOrder",
        ),
        "a stage inside MathDataModule, which builds it from those that have an example",
    ),
    "looplm.corpora.text_tokenizer.Encoded": "a protocol of two attributes, which the tokenizers' examples show",
}


def _modules() -> list[Any]:
    found = pkgutil.walk_packages(looplm.__path__, "looplm.")
    return [importlib.import_module(module.name) for module in found if not module.name.endswith("__main__")]


def _public() -> dict[str, Any]:
    """Return classes and functions by their full name; constants and type aliases are explained by a comment."""
    named = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in _modules()
        for name in getattr(module, "__all__", ())
    }
    return {name: thing for name, thing in named.items() if inspect.isclass(thing) or inspect.isfunction(thing)}


PUBLIC = _public()


def _is_allowed(name: str) -> bool:
    return any(fnmatchcase(name, allowed) for allowed in WITHOUT_EXAMPLE)


def test_every_lazy_name_is_public_where_it_lives() -> None:
    assert len(looplm.__all__) > 40
    homes = {name: getattr(looplm, name).__module__ for name in looplm.__all__}
    assert [name for name, home in homes.items() if f"{home}.{name}" not in PUBLIC] == []


def test_the_overview_names_what_the_package_gives_and_nothing_else() -> None:
    groups = (looplm.__doc__ or "").partition("Contract\n")[2].partition("Example:")[0]
    named = set(re.findall(r"\b(?:[A-Z]\w*[a-z]\w*|[a-z]+_\w+)\b", groups))
    assert set(looplm.__all__) - named == {"generate", "unroll"}  # words that may be no name
    assert {"generate", "unroll"} <= set(re.findall(r"\w+", groups))
    words = {"Train", "Measure", "Generate", "Lightning", "LightningModule", "Hugging", "Face", "Ouro", "Huginn"}
    assert named - set(looplm.__all__) == words


def test_names_of_type_checkers_are_those_that_are_loaded() -> None:
    tree = ast.parse(inspect.getsource(looplm))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == looplm._HOME


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_a_docstring(name: str) -> None:
    assert (PUBLIC[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", [name for name in PUBLIC if not _is_allowed(name)])
def test_it_has_an_example(name: str) -> None:
    assert ">>>" in PUBLIC[name].__doc__


@pytest.mark.parametrize("allowed", WITHOUT_EXAMPLE)
def test_what_is_excused_is_there_and_needs_it(allowed: str) -> None:
    excused = [name for name in PUBLIC if fnmatchcase(name, allowed)]
    assert excused
    assert [name for name in excused if ">>>" in PUBLIC[name].__doc__] == []
