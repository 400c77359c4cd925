"""The names of all subcommands and what each does, for help and completion. Imports nothing, so that both are fast."""

from __future__ import annotations

__all__ = ["LIGHTNING", "OWN", "module_of"]

LIGHTNING = {
    "fit": "train a model",
    "validate": "accuracy by depth on the validation set",
    "test": "accuracy by depth on the test set",
    "predict": "answer problems from a file or standard input",
}
"""Subcommands of LightningCLI."""

OWN = {
    "explore": "a page on this machine: a problem's answer at every depth, exits, latent path",
    "compare": "curves of several runs in one table and one picture",
    "sweep": "fit, test and compare several configs; finished runs are kept",
    "exits": "accuracy by loops of every exit and by memory of every cache",
    "eval": "run tasks of lm-evaluation-harness at any depth",
    "import": "a Hugging Face directory (Ouro, Huginn, our own) becomes a checkpoint",
    "export": "a checkpoint becomes a Hugging Face directory",
    "consolidate": "a sharded checkpoint becomes one file",
    "generate": "write a corpus of word problems with worked solutions",
    "doctor": "what works on this machine, and why the rest does not",
}
"""Subcommands with a file of their own."""


def module_of(command: str) -> str:
    """Return the module that runs one of our own subcommands.

    Example:
        >>> module_of("import"), module_of("sweep")
        ('looplm.commands.import_', 'looplm.commands.sweep')
    """
    # `import` is no name for a module.
    return f"looplm.commands.{'import_' if command == 'import' else command}"
