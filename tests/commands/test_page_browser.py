"""The comparison's HTML file in a real browser, without a network."""

from __future__ import annotations

import json
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

from chromium import FLAGS

from looplm.cli import main

DEPTHS = [0, 1, 2, 4, 8, 16, 32, 64, 128]

# Runs after the page's own script: what a reader would see, and what a click on a heading does.
_PROBE = """
<script>
window.addEventListener("load", () => {
  const names = () => [...document.querySelectorAll("#ranking tbody th")].map((cell) => cell.textContent);
  const result = {before: names()};
  result.images = [...document.images].map((image) => [image.id, image.complete, image.naturalWidth]);
  document.querySelectorAll("#ranking thead button")[1].click();
  result.after = names();
  result.resources = performance.getEntriesByType("resource").map((entry) => entry.name)
    .filter((name) => !name.startsWith("data:"));
  document.documentElement.setAttribute("data-probe", JSON.stringify(result));
});
</script>
"""


def _open(chromium: str, page: Path, profile: Path) -> tuple[dict[str, Any], list[str]]:
    """Open a copy of a page with the probe in it; return what the probe saw and the console's lines."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    flags = [
        *FLAGS,
        f"--user-data-dir={profile}",
        "--virtual-time-budget=5000",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    done = subprocess.run([chromium, *flags, probed.as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert match is not None, f"the page did not load: {done.stdout[-500:]} {done.stderr[-2000:]}"
    return json.loads(unescape(match.group(1))), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _write_run(folder: Path, holds_to: int, radius: float) -> Path:
    folder.mkdir(parents=True)
    rows = "".join(f"test,{depth},{float(depth <= holds_to)},1.0\n" for depth in DEPTHS)
    (folder / "test_curve.csv").write_text("split,depth,exact_match,token_accuracy\n" + rows)
    (folder / "test_summary.json").write_text('{"test": {"mean_depth": 4.0}}')
    dynamics = "".join(f"{depth},{radius**depth},{radius}\n" for depth in DEPTHS[1:])
    (folder / "test_dynamics.csv").write_text("depth,residual,spectral_radius\n" + dynamics)
    return folder


def test_every_figure_renders_the_table_sorts_and_the_console_is_clean(tmp_path: Path, chromium: str) -> None:
    runs = {"b_seed0": 128, "b_seed1": 64, "a <i>&amp;": 2, "c": 16}
    folders = [_write_run(tmp_path / name, holds_to, 1 - holds_to / 300) for name, holds_to in runs.items()]
    assert main(["compare", *map(str, folders), f"--output={tmp_path / 'out'}"]) == 0
    seen, console = _open(chromium, tmp_path / "out" / "comparison.html", tmp_path / "profile")
    assert [name for name, _, _ in seen["images"]] == [
        "comparison",
        "residual",
        "spectral_radius",
        "accuracy_spectral_radius",
    ]
    assert all(complete and width > 500 for _, complete, width in seen["images"]), seen["images"]
    assert seen["before"] == ["b", "c", "a <i>&amp;"]
    assert seen["after"] == ["c", "b", "a <i>&amp;"]
    assert seen["resources"] == []
    assert console == []


def test_probe_sees_a_broken_figure_and_a_message(tmp_path: Path, chromium: str) -> None:
    # The control: a page with these faults would not pass the test above.
    page = tmp_path / "broken.html"
    script = "<script>console.error('a fault'); undefinedFunction();</script>"
    image = '<img id="broken" src="data:image/png;base64,AAAA">'
    table = '<table id="ranking"><thead><tr><th><button></button></th><th><button></button></th></tr></thead></table>'
    page.write_text(f"<!doctype html><html><body>{table}{image}{script}</body></html>")
    seen, console = _open(chromium, page, tmp_path / "profile")
    assert seen["images"] == [["broken", True, 0]]
    assert ["a fault" in line for line in console] == [True, False]
    assert "undefinedFunction" in console[1]
