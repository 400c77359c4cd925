"""What `doctor` finds on this machine, and what it says where something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from looplm.cli import main
from looplm.commands.checks import check_compilation, check_extras, check_strategies


def test_report_is_json_of_what_was_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert {"analysis", "eval", "hf", "math"} <= {extra["name"] for extra in report["extras"]}
    products = {product["name"]: product for product in report["products"]}
    assert set(products) == {"finite_difference", "jvp", "vjp"}
    assert all(product["works"] for product in products.values()), products
    strategies = {strategy["name"].split(" ")[0]: strategy for strategy in report["strategies"]}
    assert strategies["auto"]["works"]
    assert strategies["ddp"]["works"] == torch.distributed.is_available()
    assert strategies["ddp"]["products"]["float32"][0] == "finite_difference"
    assert "finite_difference" not in strategies["ddp"]["products"]["bfloat16"]
    assert strategies["fsdp"]["works"] == torch.cuda.is_available()
    assert strategies["fsdp"]["works"] or "GPU" in strategies["fsdp"]["detail"]
    assert not torch.distributed.is_initialized()  # what was tried is gone


def test_text_has_a_line_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for heading in ("versions", "extras", "devices", "strategies", "products", "compilation"):
        assert f"\n{heading}\n" in f"\n{out}"
    assert all(
        line.lstrip().split()[0] in ("yes", "no") for line in out.split("extras\n")[1].split("\n\n")[0].splitlines()
    )


def test_missing_extra_comes_with_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "looplm-0.dist-info"
    folder.mkdir()
    needs = ["torch", "no-such-package>=3; extra == 'math'", "torch>=2; extra == 'hf'", "none; extra == 'dev'"]
    lines = "".join(f"Requires-Dist: {need}\n" for need in needs)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: looplm\nVersion: 0\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)
    math, hf = check_extras()
    assert (math.name, math.works, math.detail) == ("math", False, "missing: no-such-package>=3")
    assert math.remedy == "pip install 'looplm[math]'"
    assert (hf.name, hf.works, hf.remedy) == ("hf", True, None)


def test_compiler_is_really_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'probe.cpp:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", str(broken))
    found = check_compilation()
    assert not found.works
    assert "Python.h" in found.detail
    assert "python3-dev" in (found.remedy or "")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert check_compilation().detail == "no C++ compiler"


def test_product_that_fails_here_is_offered_under_no_strategy() -> None:
    for strategy in check_strategies([]):
        assert strategy.products == {"float32": [], "bfloat16": []}
