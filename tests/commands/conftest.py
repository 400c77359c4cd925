"""The browser in which pages are opened."""

from __future__ import annotations

import os
import shutil

import pytest


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
