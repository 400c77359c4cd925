"""Shared fixtures: a run whose training step takes milliseconds, and the browser in which pages are opened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import TINY, merge

# Lightning's log handlers keep the stderr they find when first imported; inside a test that would be the test's own,
# which is closed when it ends.
import looplm.commands.lightning  # noqa: F401

WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """Write the tiny config, some of its dotted keys replaced, and return its path."""

    def write(name: str = "tiny", **overrides: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        path.write_text(yaml.safe_dump(merge(TINY, dotted)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser; without one these tests are skipped, or fail where the environment asks for it."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        message = "no chromium on this machine: the page was not opened in a browser"
        if os.environ.get("LOOPLM_REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"{message}, and LOOPLM_REQUIRE_CHROMIUM=1")
        pytest.skip(message)
    return found
