"""The runs of a sweep: which configs, which seed, which directory, and what of a run's directory can be kept.

Knows files and hashes; starts no process and trains nothing. A run's directory says by stamps what stands in it:
``started.json`` from its first moment, ``fitted.json`` after training, ``finished.json`` after the test. Directories
appear and vanish by renaming, so that a kill at any moment leaves none that is half made or half removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import looplm
from looplm.commands.messages import nearest, nearest_path
from looplm.errors import InputError

__all__ = [
    "Run",
    "check_directory",
    "expand_runs",
    "is_finished",
    "is_fitted",
    "prepare_directory",
    "run_seed",
    "run_stamp",
    "write_stamp",
]

BASE = "base.yaml"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training and its test.

    Example:
        >>> options, folder = ("--seed_everything=1",), Path("runs/a_seed1")
        >>> run = Run(name="a_seed1", config_name="a", configs=(Path("a.yaml"),), options=options, directory=folder)
        >>> run.arguments
        ['--config', 'a.yaml', '--seed_everything=1', '--trainer.default_root_dir=runs/a_seed1']
    """

    name: str
    """Name of its directory."""
    config_name: str
    """Name without the seed."""
    configs: tuple[Path, ...]
    """Config files; a later one overrides an earlier one."""
    options: tuple[str, ...]
    """Options of ``fit`` and ``test`` beside the configs and the directory."""
    directory: Path
    """Where everything of it stands."""

    @property
    def stamp(self) -> dict[str, str]:
        """What the result depends on; see :func:`run_stamp`."""
        return run_stamp(self.configs, self.options)

    @property
    def arguments(self) -> list[str]:
        """Arguments that ``fit`` and ``test`` share."""
        configs = [argument for path in self.configs for argument in ("--config", str(path))]
        return [*configs, *self.options, f"--trainer.default_root_dir={self.directory}"]


def run_stamp(configs: Path | Sequence[Path], options: Sequence[str]) -> dict[str, str]:
    """Return what a run's result depends on: hashes of its configs with the options, and of the package's source.

    Args:
        configs: The config file, or all of them in order.
        options: Further options of the run.

    Raises:
        InputError: If a config cannot be read.

    Example:
        >>> import tempfile
        >>> config = Path(tempfile.mkdtemp()) / "a.yaml"
        >>> _ = config.write_text("trainer: {max_steps: 1}")
        >>> first, second = run_stamp(config, ()), run_stamp(config, ("--trainer.max_steps=2",))
        >>> [name for name in first if first[name] != second[name]]
        ['config_sha256']
    """
    settings = hashlib.sha256()
    for config in [configs] if isinstance(configs, Path) else configs:
        try:
            text = config.read_bytes()
        except OSError as error:
            hint = nearest_path(config) or "."
            raise InputError(f"config {str(config)!r} cannot be read: {error.strerror}{hint}") from None
        # The length tells two configs from one config that is their concatenation.
        settings.update(f"{len(text)}\0".encode() + text)
    settings.update("\0".join(["", *options]).encode())
    package = Path(looplm.__file__).parent
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return {"config_sha256": settings.hexdigest(), "code_sha256": source.hexdigest(), "version": looplm.__version__}


def _config_files(argument: Path) -> list[tuple[str, tuple[Path, ...]]]:
    """Return (name, config files) of one argument: a file is one run, a directory its base with each overlay."""
    if not argument.is_dir():
        return [(argument.stem, (argument,))]
    base = argument / BASE
    overlays = sorted(path for path in argument.glob("*.yaml") if path.name != BASE)
    if not base.is_file() or not overlays:
        raise InputError(f"{str(argument)!r} must hold {BASE} and at least one overlay *.yaml to be swept.")
    return [(overlay.stem, (base, overlay)) for overlay in overlays]


def expand_runs(
    arguments: Sequence[Path],
    *,
    root: Path,
    options: Sequence[str],
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
) -> list[Run]:
    """Return the runs of a sweep: every config with the first seed, then with the second, and so on.

    Args:
        arguments: Config files, and directories of a ``base.yaml`` with overlays.
        root: Folder of the run directories.
        options: Options of every run.
        seeds: Seeds; none: that of the config, and names without a seed.
        only: Names of configs, or of runs with their seed, to keep; none: all.

    Raises:
        InputError: If two configs have one name, a name in ``only`` is unknown, or a config cannot be read.

    Example:
        >>> import tempfile
        >>> study = Path(tempfile.mkdtemp())
        >>> for name in ("base", "fixed", "uniform"):
        ...     (study / f"{name}.yaml").touch()
        >>> [run.name for run in expand_runs([study], root=Path("runs"), options=(), seeds=[0, 1])]
        ['fixed_seed0', 'uniform_seed0', 'fixed_seed1', 'uniform_seed1']
    """
    found = [run for argument in arguments for run in _config_files(argument)]
    names = [name for name, _ in found]
    if len(set(names)) != len(names):
        raise InputError(f"configs must have different names, got {names}.")
    if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
        raise InputError(f"`--seeds` must be different integers >= 0, got {list(seeds)}.")
    runs = []
    for seed in seeds or (None,):
        for name, configs in found:
            full = name if seed is None else f"{name}_seed{seed}"
            seeded = (*options, *(() if seed is None else (f"--seed_everything={seed}",)))
            runs.append(Run(name=full, config_name=name, configs=configs, options=seeded, directory=root / full))
    unknown = [name for name in only if not any(name in (run.name, run.config_name) for run in runs)]
    if unknown:
        hint = nearest(unknown[0], [name for run in runs for name in (run.name, run.config_name)])
        known = "configs or runs of this sweep" if hint else f"some of {names}"  # a study has dozens
        raise InputError(f"`--only` must name {known}, got {unknown}{hint or '.'}")
    kept = [run for run in runs if not only or run.name in only or run.config_name in only]
    # A config that cannot be read is found now, not after hours.
    for run in kept:
        for config in run.configs:
            run_stamp(config, ())
    return kept


def run_seed(run: Run) -> str:
    """Return the seed that a run was trained with, as its directory's config says it; empty if that is unknown.

    Example:
        >>> import tempfile
        >>> run = Run(name="a", config_name="a", configs=(), options=(), directory=Path(tempfile.mkdtemp()))
        >>> _ = (run.directory / "config.yaml").write_text("seed_everything: 7")
        >>> run_seed(run)
        '7'
    """
    try:
        text = (run.directory / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"^seed_everything:\s*(\d+)\s*$", text, flags=re.MULTILINE)
    return match.group(1) if match else ""


def _read_stamp(path: Path) -> dict[str, str] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(path: Path, stamp: dict[str, str]) -> None:
    """Write a stamp so that a reader sees a whole one or none.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "started.json"
        >>> write_stamp(path, {"version": "0.1"})
        >>> json.loads(path.read_text())
        {'version': '0.1'}
    """
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(stamp, indent=2), encoding="utf-8")
    os.replace(temporary, path)


def is_finished(run: Run, stamp: dict[str, str]) -> bool:
    """Return whether a run's directory holds the result of these configs, options and this code.

    Example:
        >>> import tempfile
        >>> run = Run(name="a", config_name="a", configs=(), options=(), directory=Path(tempfile.mkdtemp()))
        >>> write_stamp(run.directory / "finished.json", run.stamp)
        >>> (run.directory / "test_curve.csv").touch()
        >>> is_finished(run, run.stamp), is_finished(run, {**run.stamp, "version": "of another day"})
        (True, False)
    """
    return _read_stamp(run.directory / "finished.json") == stamp and (run.directory / "test_curve.csv").is_file()


def is_fitted(run: Run, stamp: dict[str, str]) -> bool:
    """Return whether a run's directory holds the trained weights of these configs, options and this code.

    Example:
        >>> import tempfile
        >>> run = Run(name="a", config_name="a", configs=(), options=(), directory=Path(tempfile.mkdtemp()))
        >>> write_stamp(run.directory / "fitted.json", run.stamp)
        >>> is_fitted(run, run.stamp)  # its weights are missing
        False
        >>> (run.directory / "checkpoints").mkdir()
        >>> (run.directory / "checkpoints" / "last.ckpt").touch()
        >>> is_fitted(run, run.stamp)
        True
    """
    return _read_stamp(run.directory / "fitted.json") == stamp and (run.directory / "checkpoints/last.ckpt").exists()


def check_directory(run: Run) -> None:
    """Refuse a directory that holds something which no sweep has made.

    Raises:
        InputError: Names the directory.

    Example:
        >>> import tempfile
        >>> run = Run(name="a", config_name="a", configs=(), options=(), directory=Path(tempfile.mkdtemp()))
        >>> check_directory(run)  # empty
        >>> (run.directory / "thesis.txt").touch()
        >>> check_directory(run)
        Traceback (most recent call last):
            ...
        looplm.errors.InputError: '...' exists and was not made by `sweep`; name another `--root`.
    """
    holds_nothing = not run.directory.exists() or (run.directory.is_dir() and not any(run.directory.iterdir()))
    if not holds_nothing and _read_stamp(run.directory / "started.json") is None:
        raise InputError(f"{str(run.directory)!r} exists and was not made by `sweep`; name another `--root`.")


def prepare_directory(run: Run, stamp: dict[str, str], scratch: Path) -> None:
    """Make a run's directory ready for ``fit --ckpt_path=last``: empty, or as an interrupted run left it.

    Args:
        run: The run.
        stamp: Its stamp now.
        scratch: A folder in the same file system for what is being made and removed.

    Raises:
        InputError: If the directory is not ours.
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> run = Run(name="a", config_name="a", configs=(), options=(), directory=root / "a")
        >>> prepare_directory(run, run.stamp, scratch=root)
        >>> [path.name for path in run.directory.iterdir()]
        ['started.json']
    """
    new, old = scratch / f"{run.name}.new", scratch / f"{run.name}.old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    check_directory(run)
    if run.directory.exists() and _read_stamp(run.directory / "started.json") != stamp:
        os.rename(run.directory, old)
        shutil.rmtree(old)
    if not run.directory.exists():
        new.mkdir(parents=True)
        write_stamp(new / "started.json", stamp)
        os.rename(new, run.directory)
