"""Files that other tools read: citation, hooks, templates. They parse, and agree with what they repeat."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_import_ranks import FILES, RANKS

import looplm

ROOT = Path(looplm.__file__).parents[1]
TOP_LEVEL = {
    *("looplm", "data", "conf", "tests", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"),
    *("CONTRIBUTING.md", "CITATION.cff", "constraints.txt"),
}
MADE = {"runs", "build", "dist"}  # by commands; git ignores them


def _read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_top_level_holds_what_belongs_there() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.suffix != ".egg-info"}
    assert TOP_LEVEL <= found
    assert found <= TOP_LEVEL | MADE


def test_the_citation_has_all_that_its_format_asks_for() -> None:
    # Citation File Format 1.2.0: required keys, and for each author a name.
    cited = _read("CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert all({"name", "family-names"} & author.keys() for author in [*cited["authors"], *paper["authors"]])


def test_the_citation_agrees_with_package_and_readme() -> None:
    cited = _read("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["title"] == project["name"]
    assert str(cited["version"]) == looplm.__version__
    assert cited["license"] == project["license"]
    assert cited["authors"] == project["authors"]
    (paper,) = cited["references"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    entry = readme[readme.index("@inproceedings") :]
    assert paper["title"] in entry
    assert " and ".join(author["family-names"] for author in paper["authors"]) in entry
    assert paper["identifiers"][0]["value"].replace(":", " ") in entry
    assert f"{{{paper['year']}}}" in entry


def test_hooks_are_local_and_of_the_environments_version() -> None:
    (repository,) = _read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    version = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version is not None
    for hook in repository["hooks"]:
        assert {"id", "name", "entry", "language"} <= hook.keys()
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/ruff ")
        assert hook["name"].endswith(f" {version[1]}")


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()), ids=lambda path: path.stem)
def test_issue_form_is_one(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in ("checkboxes", "dropdown", "input", "markdown", "textarea")
        assert field["attributes"]["label"]


def test_make_stars_trains_beside_the_runs_of_the_configs_and_says_how_to_go_on() -> None:
    # Under `make test` the make of this test is a sub-make, which names the directories it enters.
    command = ["make", "--dry-run", "--no-print-directory", "stars"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    roots = {_read(f"conf/{name}.yaml")["trainer"]["default_root_dir"] for name in ("stars_plus", "fixed_depth")}
    (root,) = re.findall(r" --root (\S+)", done.stdout)
    assert not {f"{root}/stars_plus", f"{root}/fixed_depth"} & roots
    assert done.stdout.endswith('after: . .venv/bin/activate"\n')


def test_a_report_of_a_bug_is_asked_for_what_doctor_prints() -> None:
    (versions,) = [field for field in _read(".github/ISSUE_TEMPLATE/bug.yml")["body"] if field["id"] == "versions"]
    assert "`python -m looplm doctor`" in versions["attributes"]["description"]


def test_the_source_distribution_holds_what_the_tests_read() -> None:
    sdist = pytest.importorskip("hatchling.builders.sdist")
    held = {file.distribution_path for file in sdist.SdistBuilder(str(ROOT)).recurse_included_files()}
    tops = {Path(path).parts[0] for path in held}
    assert TOP_LEVEL | {".github", ".ci", ".pre-commit-config.yaml"} <= tops | {
        "pyproject.toml"
    }  # which it always holds


def test_files_import_from_rows_above_or_left_of_them() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| file | what it is |")[1].split("\n\n")[0]
    names = [name for row in table.splitlines() for name in re.findall(r"`([\w/]+?)(?:\.py|/)`", row.split(" | ")[0])]
    place = {name.replace("/", "."): index for index, name in enumerate(names)}
    assert set(names) - {"commands/explorer"} == RANKS.keys() - {"__main__"}
    for path in FILES:
        here = path.relative_to(ROOT / "looplm").with_suffix("").parts[0]
        if here == "__main__":
            continue
        imported = re.findall(r"^\s*(?:from|import) looplm\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert [other for other in set(imported) - {here} if place[other] > place[here]] == [], here


def test_what_contributors_are_pointed_to_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([\w./]+\.(?:py|yaml|md|toml))`", text) if name != "utils.py"}
    assert len(named) > 15
    places = [ROOT, ROOT / "looplm", ROOT / "conf" / "study"]
    assert [name for name in sorted(named) if not any((place / name).exists() for place in places)] == []
