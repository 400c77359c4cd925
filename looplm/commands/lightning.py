"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI on our module and data, with errors in one line."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import lightning as L
from jsonargparse import DefaultHelpFormatter
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

# The classes are imported so that configs can name them without their path.
import looplm
import looplm.optimizers
from looplm.callbacks import graded_answers, latent_dynamics, stability_warning, throughput  # noqa: F401
from looplm.callbacks.depth_accuracy import DepthAccuracyCurve
from looplm.callbacks.non_finite import NonFiniteGuard
from looplm.callbacks.owed_validation import OwedValidation
from looplm.callbacks.preemption import SaveOnSignal
from looplm.checkpoint_io import DurableCheckpointIO
from looplm.commands.ckpt_path import check_checkpoint
from looplm.commands.config_files import check_config_files
from looplm.commands.curve_files import describe_curves
from looplm.commands.display import RunTensorBoard, progress_for_output
from looplm.commands.messages import condense
from looplm.commands.names import LIGHTNING
from looplm.commands.next_step import command_line, last_of_run, run_config
from looplm.commands.processes import die_with_parent, lost_process
from looplm.commands.run_checkpoint import RunCheckpoint
from looplm.commands.run_trainer import RunTrainer
from looplm.commands.settings import SaveSettings
from looplm.commands.trainer_fields import check_trainer_fields
from looplm.corpora import bpe, mathematics, pretrained_tokenizer, text_tokenizer  # noqa: F401
from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.durable import recover
from looplm.errors import InputError
from looplm.module import LoopLM
from looplm.strategy import ShardedStrategy

__all__ = ["run"]


_IRRELEVANT_WARNINGS = (
    ".*does not have many workers.*",  # batches are made in less time than a worker takes to send one
    ".*LightningCLI's args parameter.*",  # we pass the process's own arguments
    ".*LeafSpec.* is deprecated.*",  # Lightning's own use of torch
)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡 Tip: For seamless cloud logging")


_EXAMPLES = {
    "fit": (
        "--config conf/stars.yaml",
        "--config conf/stars.yaml --config conf/overlays/ddp.yaml --trainer.max_steps=5000",
        "--config conf/stars.yaml --model.objective.penalty_weight=0.1 --print_config",
        "--config conf/stars.yaml --ckpt_path last",
    ),
    "validate": ("--config conf/stars.yaml",),
    "test": ("--config conf/stars.yaml", "--config conf/math.yaml --config conf/eval/gsm8k.yaml"),
    "predict": ("--config conf/stars.yaml --data.init_args.predict_file=problems.txt --model.predict_depth=16",),
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, the lines of the examples as they are written."""


def _subcommand_options() -> dict[str, dict[str, Any]]:
    """Return what begins the help: hundreds of options follow, and few will read to their end."""
    return {
        name: {
            "allow_abbrev": False,
            "usage": f"python -m looplm {name} --config CONFIG [--config OVERLAY] [--field=VALUE ...]",
            "description": "\n".join(
                [
                    f"{LIGHTNING[name]}; every field of a config is an option, --print_config prints them all",
                    "",
                    "examples:",
                    *(f"  python -m looplm {name} {line}" for line in lines),
                ]
            ),
        }
        for name, lines in _EXAMPLES.items()
    }


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if re.fullmatch(r"the following arguments are required: \w+\.data", message.strip()):
            raise InputError("`data` is missing: name a config with `--config`, or a DataModule with `--data`.") from ex
        raise InputError(condense(message, _option_names(self), looplm.__all__)) from ex


def _option_names(parser: LightningArgumentParser) -> list[str]:
    """Return the names of all options, of all subcommands and of our DataModules, without dashes."""
    options = {key.removeprefix("--") for action in parser._actions for key in action.option_strings}
    for subparser in getattr(parser._subcommands_action, "_name_parser_map", {}).values():
        options.update(_option_names(subparser))
    data = (ArithmeticDataModule, mathematics.MathDataModule)
    return [*options, *(name for kind in data for name in inspect.signature(kind).parameters)]


def _integer_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"`seed_everything` must be an integer from 0 to 2³² − 1, got {seed!r}.")
    return seed


class _Checkpoints(_CheckpointConnector):
    """Lightning's choice of the checkpoint, without one that nobody named.

    Under SLURM it would go on from any `hpc_ckpt_*.ckpt` in the run's directory, which no run of ours writes.
    """

    @property
    def _hpc_resume_path(self) -> None:
        return None


class LoopLMCLI(LightningCLI):
    """LightningCLI with a run directory, a checkpoint rule and a curve that every run has.

    ``trainer.default_root_dir`` is the run's directory: config, logs, curves and checkpoints stand there.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint and the curve; let data and seed decide what follows from them."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(DepthAccuracyCurve, "curve")
        parser.add_lightning_class_args(NonFiniteGuard, "guard")
        # Without a version counter a second fit in the same directory replaces last.ckpt, which is what `test` reads.
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.every_n_train_steps": 200,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments("data.vocab_size", "model.config.vocab_size", apply_on="instantiate")
        parser.link_arguments("data.max_positions", "model.config.max_positions", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_integer_seed)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_integer_seed)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's subcommands and the arguments that are not the user's to set."""
        return {name: {*skipped, "weights_only", "verbose"} for name, skipped in LightningCLI.subcommands().items()}

    def _parse_ckpt_path(self) -> None:
        # Lightning lets the hyper-parameters in a checkpoint override the config silently; here they are compared
        # (LoopLM.on_load_checkpoint) and a difference is an error.
        pass

    @property
    def _run_config(self) -> Any:
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        """Check, before anything is built, that the run can write and that its checkpoint can be read."""
        config = self._run_config
        try:
            check_trainer_fields(str(self.subcommand), vars(config.trainer))
        except ValueError as error:
            raise InputError(str(error)) from None
        root = Path(config.trainer.default_root_dir or "runs/default")
        config.trainer.default_root_dir = str(root)
        if self.subcommand != "fit":
            self.save_config_callback = None
        path = config.ckpt_path
        if (path is None and self.subcommand != "fit") or path == "last":
            path = root / "checkpoints" / "last.ckpt"
            recover(path)
            if path.is_symlink() and not path.exists():
                raise InputError(
                    f"{str(path)!r} links to {os.readlink(path)!r}, which is not there: name another checkpoint of "
                    f"{str(path.parent)!r} with `--ckpt_path`."
                )
            if not path.exists():
                if self.subcommand != "fit":
                    raise InputError(
                        f"{str(path)!r} does not exist: run `fit` with the same config first, or name a checkpoint "
                        "with `--ckpt_path`."
                    )
                path = None
        if path is not None:
            path = last_of_run(Path(path))
            strategy = str(getattr(config.trainer.strategy, "class_path", "")).rsplit(".", 1)[-1]
            is_for_training = self.subcommand == "fit"
            check_checkpoint(path, resumes=is_for_training, may_be_sharded=strategy == ShardedStrategy.__name__)
        config.ckpt_path = None if path is None else str(path)
        if self.subcommand != "predict":
            _check_writable(root)
        else:
            config.trainer.enable_progress_bar = False
            config.trainer.logger = False

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer, with a TensorBoard logger in the run's directory unless the config names another."""
        if self._run_config.trainer.logger in (None, True):
            root = self._run_config.trainer.default_root_dir
            kwargs["logger"] = RunTensorBoard(root)
        given = self._get(self.config_init, "trainer").callbacks
        given = [*given] if isinstance(given, list) else [given]  # the trainer adds its own to a list that it is given
        trainer: Any = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        trainer._checkpoint_connector = _Checkpoints(trainer)
        self._saves_on_signal = SaveOnSignal()
        trainer.callbacks.insert(0, self._saves_on_signal)  # before the checkpoints, which come last
        trainer.callbacks.insert(trainer.callbacks.index(trainer.checkpoint_callback), OwedValidation())
        bar = trainer.progress_bar_callback
        if bar is not None and bar not in given:
            # Whoever names one in `trainer.callbacks` gets that one.
            trainer.callbacks[trainer.callbacks.index(bar)] = progress_for_output()
        return cast(L.Trainer, trainer)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what a constructor refuses is the user's to mend."""
        model = self._run_config.model
        source = model.init_from
        try:
            if source is not None and Path(self._run_config.ckpt_path or "").is_file():
                # All that is needed stands in the checkpoint; where its run once started may be gone.
                model.init_from = self._run_config.ckpt_path
            super().instantiate_classes()
        except InputError:
            raise
        except (ValueError, TypeError, ModuleNotFoundError) as error:
            raise InputError(condense(str(error))) from error
        finally:
            model.init_from = source  # what config.yaml records

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
        # Lightning's own table has a row for every depth and metric; the curve's files say it better.
        return {**kwargs, "verbose": False} if subcommand in ("validate", "test") else kwargs

    def predict(self, **kwargs: Any) -> None:
        """Print one line a problem: the problem and the model's answer.

        Raises:
            InputError: If there are several processes: each would read the problems and know a part of the answers.
        """
        if self.trainer.world_size > 1:
            raise InputError(
                f"`predict` runs in one process, got `trainer.devices` {self._run_config.trainer.devices} on "
                f"{self.trainer.num_nodes} node(s): use `--trainer.devices=1`."
            )
        predictions: Any = self.trainer.predict(**kwargs) or []
        for line in self.datamodule.predicted_lines(predictions):
            os.write(1, f"{line}\n".encode())

    def after_fit(self) -> None:
        """Say what came of it, where everything is and what to do next."""
        root = self._run_config.trainer.default_root_dir
        if not self._saves_on_signal.has_trained:
            rank_zero_info(
                f"nothing was trained: {self.trainer.ckpt_path or 'the run'} stands at step "
                f"{self.trainer.global_step}, where `trainer.max_steps` {self.trainer.max_steps} or another limit ends "
                "the run"
            )
        self._tell_curve("val")
        rank_zero_info(
            f"run directory: {_with_files(root, 'config.yaml', 'checkpoints/', *_curve_files('val'))}\n"
            f"next: {command_line('test', '--config', Path(root) / 'config.yaml')}"
        )

    def after_validate(self) -> None:
        """Say what the curve comes to, where it is and how to look into an answer."""
        root = self._run_config.trainer.default_root_dir
        self._tell_curve("val")
        rank_zero_info(f"curve: {_with_files(root, *_curve_files('val'))}\nnext: {self._explore_line()}")

    def after_predict(self) -> None:
        """Say, beside the answers and not among them, how to look into one."""
        rank_zero_info(f"next: {self._explore_line()}")

    def after_test(self) -> None:
        """Say what the curve comes to, where it is and what to do next."""
        root = Path(self._run_config.trainer.default_root_dir)
        self._tell_curve("test")
        rank_zero_info(
            f"curve: {_with_files(root, *_curve_files('test'))}\n"
            f"next: {command_line('compare', root, 'RUN')} (the directories of other runs), or\n"
            f"      {self._explore_line()}"
        )

    def _tell_curve(self, stage: str) -> None:
        root = Path(self._run_config.trainer.default_root_dir)
        # Without a validation of its own a fit leaves the curve of an earlier one, or none.
        is_new = any(name.startswith(f"{stage}/") for name in self.trainer.callback_metrics)
        if is_new and self.trainer.is_global_zero and (root / f"{stage}_curve.csv").is_file():
            for line in describe_curves(root, stage):
                rank_zero_info(line)

    def _explore_line(self) -> str:
        """Return the command that opens the model: the run directory where it is that of the run."""
        root, path = Path(self._run_config.trainer.default_root_dir), self._run_config.ckpt_path
        if path is None or Path(path) == root / "checkpoints" / "last.ckpt":
            return command_line("explore", root)
        config = root / "config.yaml"
        if run_config(Path(path)) is None and config.is_file():  # of no run, it does not know how problems are written
            return command_line("explore", path, "--config", config)
        return command_line("explore", path)


def _curve_files(stage: str) -> list[str]:
    return [f"{stage}_{name}" for name in ("curve.csv", "curve.png", "settling.png", "summary.json")]


def _with_files(root: Path | str, *names: str) -> str:
    """Return a folder and those of its files that are there."""
    found = ", ".join(name for name in names if (Path(root) / name).exists())
    return f"{root} ({found})" if found else str(root)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"`trainer.default_root_dir` must be a folder that can be written, got {str(folder)!r}: {error.strerror}."
        ) from None


def run(argv: Sequence[str]) -> LoopLMCLI:
    """Run one of Lightning's subcommands.

    Args:
        argv: The subcommand and its options.

    Raises:
        InputError: If config, data or checkpoint are wrong.
    """
    die_with_parent()
    check_config_files(argv)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in _IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message)
    try:
        return LoopLMCLI(
            LoopLM,
            L.LightningDataModule,
            trainer_class=RunTrainer,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveSettings,
            save_config_kwargs={"overwrite": True},
            parser_class=_Parser,
            parser_kwargs={"allow_abbrev": False, "formatter_class": _HelpFormatter, **_subcommand_options()},
            args=list(argv),
        )
    except MisconfigurationException as error:  # Lightning's word for an error of the user's
        raise InputError(condense(str(error))) from error
    except SIGTERMException as ended:
        raise SystemExit(ended.args[0] if ended.args else 128 + signal.SIGTERM) from None
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # before our handlers were there; Lightning makes it a 1
            raise KeyboardInterrupt from None
        raise
    except RuntimeError as error:
        if str(error).startswith("Early stopping conditioned on metric"):
            raise InputError(f"`trainer.callbacks`: {error}") from error
        if "not used in producing the loss" in str(error):
            raise InputError(
                "`trainer.strategy` must be ddp_find_unused_parameters_true (conf/overlays/ddp.yaml): a step has left "
                "weights without gradient, as truncated backpropagation (`backprop_loops`) does in deep ones."
            ) from error
        if not lost_process(error):
            raise
        raise InputError(
            "another process of this run has ended or cannot be reached, so this one ends too; its own lines say why. "
            f"`--ckpt_path last` goes on from the last checkpoint. ({str(error).splitlines()[0][:200]})"
        ) from error
