"""Projects of other people, with the few lines that measure and steady their loops."""

from __future__ import annotations

import ast
import csv
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import looplm
from looplm.dynamics import measure_dynamics

PROJECTS = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_"))
MARK = "# +"
every_project = pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.stem)


def _added(project: Path) -> list[str]:
    return [line for line in project.read_text(encoding="utf-8").splitlines() if line.endswith(MARK)]


def _without_added_lines(project: Path, folder: Path) -> Path:
    lines = project.read_text(encoding="utf-8").splitlines()
    plain = folder / project.name
    plain.write_text("\n".join(line for line in lines if not line.endswith(MARK)) + "\n", encoding="utf-8")
    return plain


def _run(project: Path, folder: Path, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return runpy.run_path(str(project))["run"](folder, **options)


def _weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.lightning_module.parameters()])


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_there_are_three_projects() -> None:
    assert [path.stem for path in PROJECTS] == ["implicit_classifier", "puzzle_solver", "random_state_lm"]


@every_project
def test_at_most_ten_lines_are_added(project: Path) -> None:
    assert 1 <= len(_added(project)) <= 10


@every_project
def test_without_the_added_lines_it_is_their_project_alone(project: Path, tmp_path: Path) -> None:
    """It trains, knows nothing of us and writes nothing of ours."""
    plain = _without_added_lines(project, tmp_path)
    assert "looplm" not in plain.read_text()
    trainer = _run(plain, tmp_path / "run")
    assert trainer.global_step > 0
    assert not [key for key in trainer.callback_metrics if "depth_" in key]
    assert not list((tmp_path / "run").glob("val_*"))


@every_project
def test_added_lines_know_contract_callbacks_and_penalty_alone(project: Path) -> None:
    names = {
        alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(project.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    ours = {name.removeprefix("looplm.") for name in names if name.startswith("looplm")}
    homes = {looplm._HOME[name].removeprefix("looplm.") for name in ours}
    assert homes <= {
        "loop",
        "callbacks.depth_accuracy",
        "callbacks.latent_dynamics",
        "stability.penalty",
        "scoring",  # all of what it reads is the contract
    }


@pytest.fixture(scope="module", params=PROJECTS, ids=lambda path: path.stem)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A project, the folder of its run, and its trainer after it."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    return request.param, folder, _run(request.param, folder)


def test_it_gets_curve_and_dynamics(finished: tuple[Path, Path, Any]) -> None:
    _, folder, trainer = finished
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    for depth in (1, 16):
        assert 0 <= logged[f"val/exact_match/depth_{depth:05d}"] <= 1
        for name in ("residual", "state_norm", "mean_gain", "spectral_norm", "spectral_radius", "lyapunov_exponent"):
            assert math.isfinite(logged[f"val/dynamics/{name}/depth_{depth:05d}"])
        # What holds for every Jacobian: ρ ≤ ‖J‖₂, and the mean gain is a mean of squared singular values.
        norm = logged[f"val/dynamics/spectral_norm/depth_{depth:05d}"]
        assert logged[f"val/dynamics/spectral_radius/depth_{depth:05d}"] <= 1.01 * norm
        assert logged[f"val/dynamics/mean_gain/depth_{depth:05d}"] <= 1.01 * norm**2
    assert [row["depth"] for row in _rows(folder / "val_dynamics.csv")] == ["1", "16"]
    assert [row["depth"] for row in _rows(folder / "val_curve.csv")] == ["1", "16"]
    for row in _rows(folder / "val_dynamics.csv"):
        key = f"val/dynamics/spectral_radius/depth_{int(row['depth']):05d}"
        assert float(row["spectral_radius"]) == pytest.approx(logged[key], rel=1e-5)
    figures = ["curve", "residual", "state_norm", "gains", "lyapunov", "paths_2d", "paths_3d", "accuracy_and_stability"]
    for name in figures:
        assert (folder / f"val_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_penalty_reaches_the_weights_and_measuring_does_not(
    finished: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    """Also with a random initial state: the monitor neither reads nor moves the global random state."""
    project, _, trainer = finished
    lines = project.read_text(encoding="utf-8").splitlines()

    def weights_without(*parts: str) -> torch.Tensor:
        changed = tmp_path / project.name
        kept = [line for line in lines if not any(part in line for part in parts)]
        assert len(kept) == len(lines) - len(parts)
        changed.write_text("\n".join(kept) + "\n", encoding="utf-8")
        return _weights(_run(changed, tmp_path / "run"))

    penalised = _weights(trainer)
    assert penalised.isfinite().all()
    assert torch.equal(penalised, weights_without("LatentDynamicsMonitor("))
    assert not torch.equal(penalised, weights_without("LatentDynamicsMonitor(", "0.1 * JacobianPenalty"))


def test_dict_states_have_the_same_radius_as_their_concatenation() -> None:
    """The puzzle solver's two states against a dense Jacobian of both together."""
    (project,) = (path for path in PROJECTS if path.stem == "puzzle_solver")
    names = runpy.run_path(str(project))
    torch.manual_seed(0)
    solver = names["PuzzleSolver"](width=3).double()
    puzzle = names["make_puzzles"](2, 0).tensors[0]
    with torch.no_grad():
        state = solver.step(solver.embed(puzzle))
    sizes = [part[0].numel() for part in state.hidden.values()]

    def flat_step(flat: torch.Tensor, row: int) -> torch.Tensor:
        parts = [part.reshape(1, 8, 3) for part in flat.split(sizes)]
        carry = solver.think(dict(zip(state.hidden, parts, strict=True)), state.context["x"][row : row + 1])
        return torch.cat([part.flatten() for part in carry.values()])

    values, _ = measure_dynamics(solver, solver.embed(puzzle), [1], num_products=200, num_iterations=20)
    for row in range(2):
        flat = torch.cat([part[row].flatten() for part in state.hidden.values()])
        jacobian = torch.autograd.functional.jacobian(lambda x, row=row: flat_step(x, row), flat)
        assert values["spectral_radius"][0, row].item() == pytest.approx(
            torch.linalg.eigvals(jacobian).abs().max().item(), rel=0.01
        )
        assert values["spectral_norm"][0, row].item() == pytest.approx(
            torch.linalg.svdvals(jacobian)[0].item(), rel=1e-3
        )
