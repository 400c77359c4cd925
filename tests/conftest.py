"""Shared fixtures: a run so small that a training step takes milliseconds."""

from __future__ import annotations

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
