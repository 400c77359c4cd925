"""What a run shows by default: Lightning's bar and its TensorBoard logger, less what says nothing of a run of steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from looplm.callbacks.progress_lines import ProgressLines

__all__ = ["RunTensorBoard", "progress_for_output"]


class _StepBar(RichProgressBar):
    """Without the number of epochs where steps end the run, which Lightning writes as ``Epoch 0/-2``."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "  ")


def progress_for_output() -> ProgressBar:
    """Return a bar where standard output is a terminal that can redraw a line, else whole lines.

    Example:
        >>> type(progress_for_output()).__name__  # not in a terminal
        'ProgressLines'
    """
    return _StepBar() if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" else ProgressLines()


class RunTensorBoard(TensorBoardLogger):
    """TensorBoard's files in the run's directory, without Lightning's ``epoch``: a first card that is 0 throughout.

    Args:
        root: The run's directory.

    Example:
        >>> import tempfile
        >>> logger = RunTensorBoard(tempfile.mkdtemp())
        >>> logger.log_metrics({"epoch": 0, "train/loss": 1.0}, step=3)
    """

    def __init__(self, root: str) -> None:
        # Lightning's own metric would be -1 in every run; SaveSettings names those that are measured.
        super().__init__(root, name="", version="", default_hp_metric=False)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all but ``epoch``."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)
