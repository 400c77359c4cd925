"""What works on this machine, found by trying it: extras, devices, strategies, products, compilation.

Knows names and plain data, no command line. Every check ends within a second or two.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from lightning_utilities.core.imports import RequirementCache
from packaging.requirements import Requirement
from torch import Tensor, nn

import looplm
from looplm.config import LoopedConfig
from looplm.dynamics import step_function
from looplm.model import LoopedTransformer
from looplm.stability.choice import Parallelism, possible_products
from looplm.stability.products import PRODUCTS, product_named
from looplm.stability.vectors import random_unit

__all__ = [
    "Check",
    "check_compilation",
    "check_devices",
    "check_extras",
    "check_products",
    "check_strategies",
    "list_versions",
]

_PACKAGES = ("torch", "lightning", "torchmetrics", "jsonargparse", "datasets", "safetensors", "matplotlib", "numpy")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that works here or does not.

    Example:
        >>> math = Check(name="math", works=False, remedy="pip install 'looplm[math]'")
        >>> checks = [Check(name="cpu", works=True), math]
        >>> [check.remedy for check in checks if not check.works]
        ["pip install 'looplm[math]'"]
    """

    name: str
    """What it is, as it is written in a config or a requirement where there is such a name."""
    works: bool
    """Whether it does."""
    detail: str = ""
    """How it was found, or why it does not."""
    remedy: str | None = None
    """What makes it work; None: nothing, or nothing is needed."""
    products: dict[str, list[str]] = field(default_factory=dict)
    """Of a strategy: the penalty's products that are right there, the best first, by type of the weights."""


def list_versions() -> dict[str, str]:
    """Return the versions that a report of a bug needs.

    Example:
        >>> list_versions()["torch"] == torch.__version__
        True
    """
    found = {"looplm": looplm.__version__, "python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def check_extras() -> list[Check]:
    """Return which extras are installed, read from the package's own metadata; those of development left out.

    Example:
        >>> {"explore", "hf", "math"} <= {check.name for check in check_extras()}
        True
    """
    try:
        lines = requires("looplm") or []
    except PackageNotFoundError:
        return [Check(name="looplm", works=False, detail="not installed: extras unknown", remedy="pip install looplm")]
    needed: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        marker = str(requirement.marker or "")
        if "extra ==" in marker:
            extra = marker.split("extra ==")[1].strip().strip("'\"")
            needed.setdefault(extra, []).append(requirement)
    checks = []
    for extra, requirements in needed.items():
        if extra == "dev":
            continue
        names = [f"{one.name}{one.specifier}" for one in requirements]
        missing = [name for name in names if not RequirementCache(name)]
        checks.append(
            Check(
                name=extra,
                works=not missing,
                detail=f"missing: {', '.join(missing)}" if missing else ", ".join(names),
                remedy=f"pip install 'looplm[{extra}]'" if missing else None,
            )
        )
    return checks


def check_devices() -> list[Check]:
    """Return what tensors can be on.

    Example:
        >>> check_devices()[0].name
        'cpu'
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    checks = [Check(name="cpu", works=True, detail=f"{cores} cores, torch uses {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            detail = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
            checks.append(Check(name=f"cuda:{index}", works=True, detail=detail))
    else:
        built = torch.version.cuda or torch.version.hip
        reason = "no GPU that its driver offers" if built else "this torch is built without CUDA"
        checks.append(Check(name="cuda", works=False, detail=reason))
    if torch.backends.mps.is_available():
        checks.append(Check(name="mps", works=True, detail="Apple GPU"))
    return checks


def check_products(device: torch.device) -> list[Check]:
    """Compute each product of a small model's step, and its gradient, and hold it against forward-mode derivatives.

    Example:
        >>> sorted(check.name for check in check_products(torch.device("cpu")) if check.works)
        ['finite_difference', 'jvp', 'vjp']
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoopedConfig(vocab_size=8, max_positions=8, width=32, num_heads=2, ffn_width=32, init_std=0.2)
        model = LoopedTransformer(config).eval().to(device)
    state = model.embed(torch.arange(8, device=device)[None]).detach()
    vector, other = (cast(Tensor, random_unit(state.hidden, None, generator)) for _ in range(2))
    step_fn = step_function(model, state)

    def value(name: str, direction: Tensor) -> Tensor:
        return cast(Tensor, product_named(name)(step_fn, state.hidden, direction))

    checks = []
    for name in PRODUCTS:
        try:
            found = value(name, vector)
            found.square().sum().backward()
            # A bias that is added last has no part in a derivative, and no gradient.
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            is_whole = bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)
            # ⟨u, Jv⟩ = ⟨Jᵀu, v⟩ holds whichever of the two a product computes.
            exact = (other * value("jvp", vector)).sum().item()
            mine = (vector * value(name, other)).sum() if name == "vjp" else (other * found).sum()
            error = abs(mine.item() - exact) / max(abs(exact), 1e-6)
            works = is_whole and error < 0.01
            checks.append(Check(name=name, works=works, detail=f"differs from the exact derivative by {error:.1g}"))
        except (RuntimeError, NotImplementedError) as failure:
            checks.append(Check(name=name, works=False, detail=_line(failure)))
        model.zero_grad()
    return checks


def check_strategies(products: list[Check]) -> list[Check]:
    """Return which strategies of a trainer work here, and the products that are right under each.

    Args:
        products: What :func:`check_products` found; what fails there is left out.

    Example:
        >>> one_device = check_strategies([Check(name="jvp", works=True), Check(name="vjp", works=False)])[0]
        >>> one_device.works, one_device.products["float32"]
        (True, ['jvp'])
    """
    works_here = {check.name for check in products if check.works}
    has_gpu = torch.cuda.is_available()
    group, shards = _try_processes()
    needs_gpu = None if has_gpu else "Lightning runs it on GPUs only"
    deepspeed = needs_gpu or (None if RequirementCache("deepspeed") else "deepspeed is not installed")
    remedy = "pip install deepspeed" if has_gpu and deepspeed else None
    rows: list[tuple[str, Parallelism, str | None, str | None]] = [
        ("auto (one device)", "single", None, None),
        ("ddp", "ddp", group, None),
        ("looplm.ShardedStrategy (FSDP 2)", "fsdp2", shards, None),
        ("fsdp (FSDP 1)", "fsdp1", needs_gpu, None),
        ("deepspeed_stage_2", "deepspeed", deepspeed, remedy),
        ("deepspeed_stage_3", "deepspeed_stage_3", deepspeed, remedy),
    ]
    checks = []
    for name, parallelism, reason, mend in rows:
        known = {
            label: [str(p) for p in possible_products(parallelism, narrow_weights=narrow) if p in works_here]
            for label, narrow in (("float32", False), ("bfloat16", True))
        }
        checks.append(Check(name=name, works=reason is None, detail=reason or "", remedy=mend, products=known))
    return checks


def _try_processes() -> tuple[str | None, str | None]:
    """Make a group of one process and shard a layer in it; return why each fails, or None."""
    if not dist.is_available():
        reason = "this torch is built without torch.distributed"
        return reason, reason
    if dist.is_initialized():
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meeting_place", rank=0, world_size=1)
        except (RuntimeError, ValueError) as error:
            reason = f"gloo: {_line(error)}"
            return reason, reason
        try:
            number = torch.ones(1)
            dist.all_reduce(number)
            return None if number.item() == 1 else "gloo: wrong sum", _try_sharding()
        finally:
            dist.destroy_process_group()


def _try_sharding() -> str | None:
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        layer = nn.Linear(2, 2)
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        layer(torch.ones(1, 2)).sum().backward()
    except (ImportError, RuntimeError, ValueError) as error:
        return f"FSDP 2: {_line(error)}"
    return None


def check_compilation() -> Check:
    """Return whether ``torch.compile`` has what it needs: on a CPU a C++ compiler, its OpenMP and Python's headers.

    Example:
        >>> check = check_compilation()
        >>> check.works == ("compiles with OpenMP" in check.detail)
        True
    """
    name = "torch.compile"
    if torch.cuda.is_available() and not RequirementCache("triton"):
        return Check(name=name, works=False, detail="triton is not installed", remedy="pip install triton")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return Check(name=name, works=False, detail="no C++ compiler", remedy="install g++")
    include = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        command = [compiler, "-shared", "-fPIC", "-fopenmp", f"-I{include}", str(source), "-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Check(name=name, works=False, detail=f"{compiler}: {_line(error)}")
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "failed")
        remedy = "install Python's headers (python3-dev)" if "Python.h" in reason else None
        return Check(name=name, works=False, detail=f"{Path(compiler).name}: {reason.strip()}", remedy=remedy)
    return Check(name=name, works=True, detail=f"{Path(compiler).name} compiles with OpenMP and Python's headers")


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
