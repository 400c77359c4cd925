"""``eval``: the command line of lm-evaluation-harness with the model ``looplm`` in it (needs ``looplm[eval]``).

The harness looks for models in its own package only; this is ``lm_eval run`` after ours has been registered.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from looplm.errors import InputError

__all__ = ["run"]

_HELP = """\
usage: python -m looplm eval --model looplm --model_args pretrained=MODEL,num_loops=N --tasks TASK ... [options]

MODEL is a Hugging Face directory with a tokenizer, a hub id of one, or a checkpoint made from one; N the loops.

examples:
  python -m looplm eval --model looplm --model_args pretrained=OUT,num_loops=8 --tasks gsm8k
  python -m looplm eval --model looplm --model_args pretrained=OUT,num_loops=32 --tasks arc_easy piqa --limit 100

The help of lm-evaluation-harness, whose options these are:

"""


def run(argv: Sequence[str]) -> int:
    """Run the harness on arguments of ``lm_eval run``; for them see ``--help``.

    Raises:
        InputError: If the harness is not installed, or the model cannot be read.
    """
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(_HELP)
    try:
        import looplm.harness  # noqa: F401 - registers the model
    except ModuleNotFoundError as error:
        raise InputError(str(error)) from None
    import torch
    from lm_eval.__main__ import cli_evaluate

    # The harness's own default is a GPU. A later --device wins over this one, but so would this one over a file's.
    in_file = any(argument.startswith(("--config", "-C")) for argument in argv)
    device = [] if not argv or in_file or torch.cuda.is_available() else ["--device", "cpu"]
    sys.argv = ["lm_eval", "run", *device, *argv]  # the harness reads the process's own arguments
    try:
        cli_evaluate()
    except InputError:
        raise
    except ValueError as error:  # the harness's word for an error of the user's, such as an unknown task
        raise InputError(str(error)) from error
    return 0
