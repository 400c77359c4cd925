"""What a run's ``config.yaml`` says of its data. Knows files and names; builds nothing but arithmetic problems."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from looplm.commands.messages import nearest_path
from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.errors import InputError

__all__ = ["RunData", "read_run_data"]

# What training does and which files it is tested on says nothing of how a problem is written.
_IRRELEVANT = ("digit_stages", "test_file", "test_digits", "predict_file")


@dataclass(frozen=True)
class RunData:
    """The DataModule of a run.

    Example:
        >>> RunData("ArithmeticDataModule", {"max_digits": 4, "test_file": "moved.txt"}).arithmetic().max_digits
        4
    """

    class_name: str
    """Its class, without the module."""
    arguments: dict[str, Any]
    """Its constructor's arguments."""

    def arithmetic(self) -> ArithmeticDataModule:
        """Return the arithmetic problems that the run was trained on.

        Raises:
            InputError: If it was trained on something else, or an argument is wrong.
        """
        if self.class_name != ArithmeticDataModule.__name__:
            raise InputError(f"the run must be one on ArithmeticDataModule, got {self.class_name}.")
        arguments = {name: value for name, value in self.arguments.items() if name not in _IRRELEVANT}
        try:
            return ArithmeticDataModule(**arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"config.yaml, `data`: {error}") from None


def read_run_data(config: Path) -> RunData:
    """Read the ``data`` of a run's config.

    Args:
        config: The ``config.yaml`` that ``fit`` has left in the run directory.

    Raises:
        InputError: If there is none, or it is none.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.yaml"
        >>> _ = path.write_text("data: {class_path: looplm.ArithmeticDataModule, init_args: {max_digits: 4}}")
        >>> read_run_data(path).class_name
        'ArithmeticDataModule'
    """
    try:
        data = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
        return RunData(str(data["class_path"]).rsplit(".", 1)[-1], dict(data.get("init_args") or {}))
    except FileNotFoundError:
        hint = nearest_path(config.parent) or "; run `python -m looplm fit` first."
        raise InputError(f"{str(config)!r} is no config.yaml of a run: there is no such file{hint}") from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{str(config)!r} is no config.yaml of a run ({type(error).__name__}).") from None
