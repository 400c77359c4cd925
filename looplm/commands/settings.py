"""A run's settings in every logger, in TensorBoard beside the accuracies that validation logs.

A checkpoint keeps the architecture alone; loggers get all that tells two runs apart. Knows the resolved config as plain
data, and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

__all__ = ["SaveSettings", "flat_settings"]

_OF_THE_TRAINER = ("max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")


class SaveSettings(SaveConfigCallback):
    """Saves ``config.yaml``, as Lightning's own does, and gives the settings of the run to every logger.

    Example:
        >>> from lightning.pytorch.cli import LightningCLI
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel
        >>> options = {"seed_everything_default": False, "run": False, "args": []}
        >>> cli = LightningCLI(DemoModel, BoringDataModule, save_config_callback=SaveSettings, **options)
        >>> [type(callback).__name__ for callback in cli.trainer.callbacks if isinstance(callback, SaveConfigCallback)]
        ['SaveSettings']
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save the config, but not that it went on from a checkpoint of its own: it is to make the run anew."""
        path = self.config.get("ckpt_path")
        if path is not None and Path(path).resolve().is_relative_to(Path(trainer.default_root_dir).resolve()):
            self.config = self.config.clone()
            self.config["ckpt_path"] = None
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Log the settings; called once, on rank zero."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        chosen = {name: config[name] for name in ("seed_everything", "model", "data") if name in config}
        chosen["trainer"] = {name: config["trainer"][name] for name in _OF_THE_TRAINER}
        settings = flat_settings(chosen)
        columns = ("peak", "escapes", *(f"depth_{depth:05d}" for depth in config["model"]["val_depths"]))
        accuracies = [f"val/exact_match/{column}" for column in columns]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _show_in_tensorboard(logger, settings, accuracies)
            else:
                logger.log_hyperparams(settings)


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested settings as one level of dotted names; a list is written as YAML writes it, None as ``none``.

    Example:
        >>> flat_settings({"model": {"width": 16, "val_depths": [1, 4], "penalty": None}})
        {'model.width': 16, 'model.val_depths': '[1, 4]', 'model.penalty': 'none'}
    """
    flat: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + name] = value
        else:
            flat[prefix + name] = "none" if value is None else str(value)
    return flat


def _show_in_tensorboard(logger: TensorBoardLogger, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Fill the HParams tab: settings in columns, and beside them the last value of each scalar in ``metrics``.

    Lightning's own would log a value for each metric at step 0, which no one has measured.
    """
    from torch.utils.tensorboard.summary import hparams

    logger.hparams.update(settings)
    writer = logger.experiment._get_file_writer()
    for summary in hparams(dict(settings), dict.fromkeys(metrics, 0.0)):
        writer.add_summary(summary)
