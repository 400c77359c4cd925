"""``sweep``: fit and test several configs, each in a run directory of its own, then compare them.

A finished run is kept and not repeated as long as its config, its options and the package's source are the same; a
killed one goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import looplm
from looplm.commands.arguments import Parser
from looplm.commands.compare import compare
from looplm.errors import InputError

__all__ = ["run", "run_stamp"]


def run_stamp(config: Path, options: Sequence[str]) -> dict[str, str]:
    """Return what a run's result depends on: hashes of its config with the options, and of the package's source.

    Raises:
        InputError: If the config cannot be read.
    """
    try:
        text = config.read_bytes()
    except OSError as error:
        raise InputError(f"config {str(config)!r} cannot be read: {error.strerror}.") from None
    settings = hashlib.sha256(text + "\0".join(["", *options]).encode()).hexdigest()
    package = Path(looplm.__file__).parent
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return {"config_sha256": settings, "code_sha256": source.hexdigest(), "version": looplm.__version__}


def _read_stamp(path: Path) -> dict[str, str] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _write_stamp(path: Path, stamp: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(stamp, indent=2), encoding="utf-8")
    os.replace(temporary, path)


def _call(command: str, *options: str) -> None:
    arguments = [sys.executable, "-m", "looplm", command, *options]
    sys.stdout.write("$ python -m looplm " + " ".join([command, *options]) + "\n")
    sys.stdout.flush()
    code = subprocess.run(arguments, check=False).returncode
    if code:
        raise InputError(f"`python -m looplm {' '.join([command, *options])}` ended with exit code {code}.")


def _fit_and_test(config: Path, run_dir: Path, options: Sequence[str]) -> None:
    stamp = run_stamp(config, options)
    if _read_stamp(run_dir / "finished.json") == stamp and (run_dir / "test_curve.csv").is_file():
        sys.stdout.write(f"{run_dir}: finished already with this config and this code; kept\n")
        return
    resumes = _read_stamp(run_dir / "started.json") == stamp
    if run_dir.exists() and not resumes:
        if any(run_dir.iterdir()) and _read_stamp(run_dir / "started.json") is None:
            raise InputError(f"{str(run_dir)!r} exists and was not made by `sweep`; name another `--root`.")
        shutil.rmtree(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(run_dir)!r} must be a folder that can be written: {error.strerror}.") from None
    _write_stamp(run_dir / "started.json", stamp)
    common = ["--config", str(config), *options, f"--trainer.default_root_dir={run_dir}"]
    _call("fit", *common, "--ckpt_path=last")
    _call("test", *common)
    _write_stamp(run_dir / "finished.json", stamp)


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    parser = Parser(
        "sweep",
        description=__doc__,
        epilog="Further options, such as --trainer.max_steps=100, go to every fit and test.",
    )
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="config of one run")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the run directories")
    args, options = parser.parse_known_args(argv)
    stems = [config.stem for config in args.configs]
    if len(set(stems)) != len(stems):
        raise InputError(f"configs must have different names, got {stems}.")
    run_dirs = [args.root / stem for stem in stems]
    for config, run_dir in zip(args.configs, run_dirs, strict=True):
        _fit_and_test(config, run_dir, options)
    compare(run_dirs, args.root / "compare")
    return 0
