"""The shared run, as a config file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from processes import BASE


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path
