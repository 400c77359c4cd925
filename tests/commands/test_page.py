"""The comparison as one HTML file: what stands in it, and the numbers that it is sorted by."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from looplm.cli import main
from looplm.commands.curve_files import read_dynamics
from looplm.commands.curves import Curve, accuracy_at, area_under_curve, group_runs
from looplm.commands.rows import append_row
from looplm.errors import InputError

DEPTHS = [0, 1, 2, 4, 8, 16, 32, 64, 128]
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write what a run leaves behind: right up to a depth, then wrong."""

    def make(name: str, holds_to: int, *, mean_depth: float = 4.0, dynamics: str | None = None) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        rows = [f"test,{depth},{float(2 <= depth <= holds_to)},1.0\n" for depth in DEPTHS]
        (folder / "test_curve.csv").write_text("split,depth,exact_match,token_accuracy\n" + "".join(rows))
        (folder / "test_summary.json").write_text(f'{{"test": {{"mean_depth": {mean_depth}}}}}')
        if dynamics is not None:
            (folder / "test_dynamics.csv").write_text(dynamics)
        return folder

    return make


def _dynamics(radius: float) -> str:
    rows = "".join(f"{depth},{radius**depth},{radius},{radius**2},\n" for depth in DEPTHS[1:])
    return "depth,residual,spectral_radius,mean_gain,lyapunov_exponent\n" + rows


class _Page(HTMLParser):
    """Collects images, table cells and everything that names another file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.heads: list[tuple[str, str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.links += [found[name] for name in ("src", "href", "srcset", "data", "action") if name in found]
        if tag == "img":
            self.images.append(found)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
            if "aria-sort" in found:
                self.heads.append((found["aria-sort"], str(len(self.rows[-1]))))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def _page(tmp_path: Path, *runs: Path) -> _Page:
    assert main(["compare", *map(str, runs), f"--output={tmp_path / 'out'}"]) == 0
    return _Page((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))


def test_page_has_every_figure_in_itself_and_names_no_other_file(tmp_path: Path, make_run: MakeRun) -> None:
    page = _page(tmp_path, make_run("stable", 128, dynamics=_dynamics(0.9)), make_run("plain", 8))
    names = ["comparison", "residual", "spectral_radius", "mean_gain", "accuracy_spectral_radius", "accuracy_mean_gain"]
    assert [image["id"] for image in page.images] == names
    assert page.links == [image["src"] for image in page.images]
    for image in page.images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        png = base64.b64decode(data, validate=True)
        assert png.startswith(b"\x89PNG")
        assert (tmp_path / "out" / f"{image['id']}.png").read_bytes() == png
        assert len(image["alt"]) > 20


def test_page_without_dynamics_has_curves_alone(tmp_path: Path, make_run: MakeRun) -> None:
    page = _page(tmp_path, make_run("a", 8))
    assert [image["id"] for image in page.images] == ["comparison"]
    assert "spectral radius" not in " ".join(page.rows[0])


def test_names_are_text_not_markup(tmp_path: Path, make_run: MakeRun) -> None:
    name = "[red]<script>alert(1)<img src=x> & $x$ \"q'"
    page = _page(tmp_path, make_run(name, 8))
    assert name not in (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert page.rows[1][1] == name
    assert len(page.images) == 1


def test_table_is_sorted_by_robustness_and_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run("short", 4), make_run("long", 128), make_run("middle_seed0", 8), make_run("middle_seed1", 32)]
    page = _page(tmp_path, *runs)
    assert [row[1] for row in page.rows[1:]] == ["long", "middle", "short"]
    assert [row[2] for row in page.rows[1:]] == ["1", "2", "1"]
    assert page.rows[0][4] == "area to 8× (%)"
    assert [sort for sort, _ in page.heads] == ["none"] * 4 + ["descending"] + ["none"] * (len(page.heads) - 5)

    with (tmp_path / "out" / "robustness.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    # By hand: 0 at 0 and 1, rising to 1 at 2, then right to 32 = 8 × 4.
    assert float(rows["long"]["robustness"]) == pytest.approx((32 - 1.5) / 32)
    # Seeds: right to 8 and falling to 0 at 16; right to 32.
    assert float(rows["middle"]["robustness_min"]) == pytest.approx((0.5 + 6 + 4) / 32)
    assert float(rows["middle"]["robustness_max"]) == pytest.approx((32 - 1.5) / 32)
    middle = [float(rows["middle"][f"robustness{end}"]) for end in ("", "_min", "_max")]
    assert middle[0] == pytest.approx(sum(middle[1:]) / 2)
    assert [rows[name]["exact_match_16x"] for name in ("long", "middle", "short")] == ["1.0", "0.0", "0.0"]


def test_many_groups_get_a_panel_each(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run(f"a_rather_long_name_of_run_{index}", 2 ** (index % 7)) for index in range(9)]
    page = _page(tmp_path, *runs)
    assert len(page.rows) == 10
    png = base64.b64decode(page.images[0]["src"].split(",", 1)[1])
    width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
    assert width > 1000
    assert height > 600


def test_rows_file_gives_the_page_of_its_runs(tmp_path: Path, make_run: MakeRun) -> None:
    path = tmp_path / "rows.csv"
    stamp = {"config_sha256": "c", "code_sha256": "d", "version": "1"}
    dynamics = {"depth": [1.0, 4.0], "residual": [0.5, math.nan], "spectral_radius": [0.8, 0.9]}
    for name in ("a_seed0", "a_seed1"):
        curve = Curve(
            name=name,
            depths=DEPTHS,
            exact_match=[1.0] * 9,
            token_accuracy=[1.0] * 9,
            mean_depth=4.0,
            dynamics=dynamics,
        )
        append_row(path, curve, stamp, "0")
    page = _page(tmp_path, path, make_run("b", 8))
    assert [row[1:3] for row in page.rows[1:]] == [["a", "2"], ["b", "1"]]
    assert [image["id"] for image in page.images][:3] == ["comparison", "residual", "spectral_radius"]


@pytest.mark.parametrize("last", [6.0, 8.0, 100.0, 128.0])
def test_area_is_the_trapezoid_rule(last: float) -> None:
    rng = np.random.default_rng(0)
    accuracy = rng.random(len(DEPTHS)).tolist()
    fine = np.union1d(np.linspace(0, last, 100_001), [depth for depth in DEPTHS if depth <= last])
    expected = np.trapezoid(np.interp(fine, DEPTHS, accuracy), fine) / last
    assert area_under_curve(DEPTHS, accuracy, last=last) == pytest.approx(expected, abs=1e-9)


def test_area_of_a_perfect_curve_is_one_wherever_it_begins() -> None:
    assert area_under_curve([4, 8, 100], [1.0, 1.0, 1.0], last=32) == 1.0


def test_curve_that_ends_early_has_no_area_and_no_value_there() -> None:
    assert area_under_curve([0, 4, 8], [1.0, 1.0, 1.0], last=32) is None
    assert accuracy_at([0, 4, 8], [1.0, 1.0, 1.0], 64) is None


def _curve(name: str, holds_to: int, mean_depth: float | None = 4.0) -> Curve:
    accuracy = [float(depth <= holds_to) for depth in DEPTHS]
    return Curve(name=name, depths=DEPTHS, exact_match=accuracy, token_accuracy=accuracy, mean_depth=mean_depth)


def test_runs_without_mean_depth_stand_last() -> None:
    groups = group_runs([_curve("none", 128, None), _curve("short", 1), _curve("long_seed0", 32)])
    assert [group.name for group in groups] == ["long", "short", "none"]
    assert groups[2].robustness is None


def test_dynamics_take_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "test_dynamics.csv"
    path.write_text(
        "split,depth,spectral_radius,state_norm,lyapunov_exponent,other\ntest,1,0.5,,nan,x\ntest,2,,,-0.1,y\nb,1,9,9,9,z\n"
    )
    found = read_dynamics(path)
    assert list(found) == ["depth", "spectral_radius", "lyapunov_exponent"]
    assert found["depth"] == [1.0, 2.0]
    assert found["spectral_radius"][0] == 0.5
    assert math.isnan(found["spectral_radius"][1])
    assert found["lyapunov_exponent"][1] == -0.1
    assert read_dynamics(tmp_path / "val_dynamics.csv") == {}


@pytest.mark.parametrize("content", ["residual\n0.5\n", "depth,residual\n1,large\n", "depth,residual\n,0.5\n"])
def test_damaged_dynamics_are_refused_by_their_path(tmp_path: Path, content: str) -> None:
    path = tmp_path / "test_dynamics.csv"
    path.write_text(content)
    with pytest.raises(InputError, match="is no table of dynamics") as caught:
        read_dynamics(path)
    assert str(path) in str(caught.value)
