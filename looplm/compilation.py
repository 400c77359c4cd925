"""What has to be there before a model is compiled. Knows no model."""

from __future__ import annotations

import os
import shutil

import torch

from looplm.errors import InputError

__all__ = ["check_backend", "check_compiler"]


def check_backend(backend: str) -> None:
    """Check the name of a ``torch.compile`` backend.

    Raises:
        ValueError: If there is none of that name; the message lists them.

    Example:
        >>> check_backend("inductor")
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"`compile_backend` must be one of {sorted(known)} or null, got {backend!r}.")


def check_compiler(backend: str, device: torch.device) -> None:
    """Check that the C++ compiler is there which ``inductor`` calls for a CPU.

    Raises:
        InputError: If it is not; torch's own error comes with the first step, in a page of text.

    Example:
        >>> check_compiler("aot_eager", torch.device("cpu"))  # needs none
    """
    if backend != "inductor" or device.type != "cpu":
        return
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise InputError(
            f"`model.compile_backend: inductor` needs a C++ compiler on a CPU, and {' and '.join(names)} cannot be "
            "found: install one, name it in CXX, or leave `compile_backend` null."
        )
