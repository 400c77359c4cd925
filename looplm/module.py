"""The LightningModule that trains a looped transformer. Knows Lightning; the science is in the objective."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from looplm.cache import LoopKVCache
from looplm.checkpoints import load_model
from looplm.compilation import check_backend, check_compiler
from looplm.config import LoopedConfig
from looplm.depth import LogNormalDepth
from looplm.errors import InputError
from looplm.flops import penalty_flops, training_flops
from looplm.generation import generate_at_depths
from looplm.loop import Hidden, LoopState, check_depths
from looplm.lr_schedule import LRSchedule
from looplm.metrics import share_all_right
from looplm.model import LoopedTransformer
from looplm.objective import ObjectiveOutput, STARSObjective
from looplm.origin import pack_origin
from looplm.parallel import choose_product, count_labels, shard_looped, warn_of_lost_updates
from looplm.randomness import StepKey
from looplm.scoring import predictions_at_depths

__all__ = ["LoopLM"]


def _pretrained(config: LoopedConfig, source: str) -> LoopedTransformer:
    model = load_model(source, dtype=torch.float32)
    try:
        asked, config = config, config.for_weights(model.config)
    except ValueError as error:
        raise InputError(f"`init_from` {source!r}: {error}") from None
    # A default cannot be told from the same value given: whoever gave it must see that it is not used.
    followed = [f"{name} {value}" for name, value in config.to_dict().items() if value != getattr(asked, name)]
    rank_zero_info(
        f"weights of {source}: {', '.join(followed) or 'every field of `model.config`'} as there; dropout "
        f"{config.dropout} as in `model.config`"
    )
    if config != model.config:
        weights, origin = model.state_dict(), model.origin
        with torch.device("meta"):
            model = LoopedTransformer(config)
        model.load_state_dict(weights, assign=True)
        model.origin = origin
    # Lightning leaves every part in the mode in which it comes.
    return model.train()


class LoopLM(L.LightningModule):
    """Trains, evaluates and queries a :class:`~looplm.model.LoopedTransformer`.

    Itself a :class:`~looplm.loop.LoopedModel`. Batches are dicts as made by
    :class:`~looplm.corpora.arithmetic.ArithmeticDataModule` and
    :class:`~looplm.corpora.mathematics.MathDataModule`. ``validation_step`` and ``test_step`` return what
    :class:`~looplm.callbacks.depth_accuracy.DepthAccuracyCurve` reads. ``loops_per_batch`` and ``flops_per_batch`` are
    those of the last training step, penalty included, which
    :class:`~looplm.callbacks.throughput.ThroughputMeter` reads.

    Args:
        config: The architecture, or its fields as a dict. Only this goes into checkpoints as hyper-parameters.
        objective: The loss.
        optimizer: Makes an optimiser of ``named_parameters()``: any of torch's takes names as well as not.
        lr_schedule: Learning rate by optimiser step.
        val_depths: Depths of the curve during training.
        test_depths: Depths of the curve in ``test``.
        predict_depth: Depth at which ``predict`` answers.
        max_new_tokens: Longest answer in ``predict``, and in the ``test`` of a DataModule that asks for answers.
        num_samples: Answers to each problem in such a test, for votes and pass@k.
        temperature: Of the draws of these answers; 0: greedy.
        seed: Seed of every draw of a training step.
        init_from: Start from these weights: a checkpoint file, a Hugging Face directory or a hub id (Ouro, Huginn, our
            own). The architecture is theirs, see :meth:`~looplm.config.LoopedConfig.for_weights`, but for ``dropout``;
            trained in float32 unless ``trainer.precision`` says otherwise. None: random weights.

        compile_backend: Train with compiled core blocks, see
            :meth:`~looplm.model.LoopedTransformer.compile_core`: ``inductor``, or another backend of ``torch.compile``.
            The first steps take minutes. None: as PyTorch runs them.

    Raises:
        InputError: If ``init_from`` cannot be read or has another architecture.
        ValueError: If a list of depths is not increasing, or a number is out of its range.

    Example:
        >>> from looplm import FixedDepth, STARSObjective
        >>> config = LoopedConfig(vocab_size=15, max_positions=16, width=16, num_heads=2, ffn_width=32)
        >>> module = LoopLM(config, STARSObjective(depth_sampler=FixedDepth(4)), val_depths=[4, 64])
        >>> module.config.width
        16
    """

    def __init__(
        self,
        config: LoopedConfig,
        objective: STARSObjective = STARSObjective(depth_sampler=LogNormalDepth()),  # noqa: B008 - immutable
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_schedule: LRSchedule = LRSchedule(),  # noqa: B008 - immutable
        val_depths: list[int] = [1, 2, 4, 8, 16, 32, 64],  # noqa: B006 - read only
        test_depths: list[int] = [0, 1, 2, 4, 8, 16, 32, 64, 100],  # noqa: B006 - read only
        predict_depth: int = 8,
        max_new_tokens: int = 32,
        num_samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        init_from: str | None = None,
        compile_backend: str | None = None,
    ) -> None:
        super().__init__()
        if compile_backend is not None:
            check_backend(compile_backend)
        if predict_depth < 0 or max_new_tokens < 1:
            raise ValueError(
                f"`predict_depth` must be >= 0 and `max_new_tokens` >= 1, got {predict_depth} and {max_new_tokens}."
            )
        if num_samples < 1 or not temperature >= 0:
            raise ValueError(f"`num_samples` must be >= 1 and `temperature` >= 0, got {num_samples} and {temperature}.")
        if num_samples > 1 and temperature == 0:
            raise ValueError(f"`num_samples` has no effect with `temperature: 0`, which is greedy, got {num_samples}.")
        config = LoopedConfig.from_dict(config) if isinstance(config, Mapping) else config
        if init_from is None:
            # The initial weights depend on the seed alone, not on what drew from the global state before.
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.model = LoopedTransformer(config)
        else:
            self.model = _pretrained(config, init_from)
        # For checkpoints; the command line gives loggers the whole config.
        self.save_hyperparameters({"config": self.model.config.to_dict()}, logger=False)
        if objective.spare_unlabelled and self.model.config.num_coda_layers:
            raise ValueError(
                "`objective.spare_unlabelled` has no effect with a coda, which reads every last state, got "
                f"`num_coda_layers` {self.model.config.num_coda_layers}."
            )
        self.objective = objective
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.val_depths = check_depths("val_depths", val_depths)
        self.test_depths = check_depths("test_depths", test_depths)
        self.predict_depth = predict_depth
        self.max_new_tokens = max_new_tokens
        self.num_samples = num_samples
        self.temperature = temperature
        self.seed = seed
        self.compile_backend = compile_backend
        self.loops_per_batch = 0
        self.flops_per_batch = 0
        self._num_trained_steps = 0  # of the checkpoint

    @property
    def config(self) -> LoopedConfig:
        """The model's architecture."""
        return self.model.config

    def embed(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        initial_hidden: Hidden | None = None,
        cache: LoopKVCache | None = None,
    ) -> LoopState:
        """See :meth:`~looplm.model.LoopedTransformer.embed`."""
        return self.model.embed(inputs, attention_mask, initial_hidden, cache)

    def step(self, state: LoopState, cache: LoopKVCache | None = None) -> LoopState:
        """See :meth:`~looplm.model.LoopedTransformer.step`."""
        return self.model.step(state, cache)

    def decode(
        self, state: LoopState, cache: LoopKVCache | None = None, logits_to_keep: int | Tensor | None = None
    ) -> Tensor:
        """See :meth:`~looplm.model.LoopedTransformer.decode`."""
        return self.model.decode(state, cache, logits_to_keep)

    def exit_logit(self, state: LoopState) -> Tensor:
        """See :meth:`~looplm.model.LoopedTransformer.exit_logit`."""
        return self.model.exit_logit(state)

    def make_cache(self, batch_size: int, max_tokens: int, num_loops: int, policy: str = "per_loop") -> LoopKVCache:
        """See :meth:`~looplm.model.LoopedTransformer.make_cache`."""
        return self.model.make_cache(batch_size, max_tokens, num_loops, policy)

    def configure_model(self) -> None:
        """Shard the model where the strategy is FSDP 2; see :func:`~looplm.parallel.shard_looped`."""
        if self._device_mesh is not None:
            shard_looped(self, [*self.model.prelude, *self.model.coda], self._device_mesh)

    def on_fit_start(self) -> None:
        """Choose the penalty's product for this strategy and precision, and say which; compile what is compiled.

        Warns where most weights are too coarse for the learning rate.

        Raises:
            InputError: If the config names a product that does not work there, or there is no compiler.
        """
        if self.compile_backend is not None:
            check_compiler(self.compile_backend, self.device)
            self.model.compile_core(self.compile_backend)
        if self.objective.penalty is not None:
            self.objective = replace(self.objective, penalty=choose_product(self.objective.penalty, self.trainer))
        warn_of_lost_updates(self.trainer)

    def _step_key(self) -> StepKey:
        return StepKey(
            seed=self.seed,
            micro_batch=self.trainer.fit_loop.epoch_loop.total_batch_idx,
            optimizer_step=self.trainer.global_step,
            rank=self.trainer.global_rank,
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch; logs loss, cross-entropy, penalty, depth and exact match."""
        key = self._step_key()
        # Dropout reads the global state; seeding it from the key makes resumed runs exact.
        # On a CPU its own generator alone: `torch.manual_seed` takes 2 ms to seed devices that are not there.
        seed_all = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        seed_all(key.fold("dropout"))
        out = self.objective(self.model, batch, key, count_labels(batch, self.trainer))
        self.loops_per_batch, self.flops_per_batch = out.depth, self._count_flops(batch["input_ids"], out)
        exact_match = share_all_right(out.preds == batch["labels"], batch.get("attention_mask"))
        shown: dict[str, Any] = {"loss": out.loss.detach(), "exact_match": exact_match}
        if out.penalty is not None:
            shown["penalty"] = out.penalty
        shown["depth"] = float(out.depth)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        quiet = {"cross_entropy": out.cross_entropy, "penalty_weight": out.penalty_weight, "learning_rate": rate}
        self.log_dict(shown, prog_bar=True, logger=False)  # short names fit into a line of a terminal
        self.log_dict({f"train/{name}": value for name, value in {**shown, **quiet}.items()})
        return out.loss

    def _count_flops(self, inputs: Tensor, out: ObjectiveOutput) -> int:
        batch_size, length = inputs.shape
        spared = (self.objective.backprop_loops, out.num_preds, out.num_queries)
        flops = training_flops(self.config, batch_size, length, out.depth, *spared)
        if self.objective.penalty is None or out.penalty is None:
            return flops
        state_is_spared = out.num_queries < batch_size * length
        return flops + penalty_flops(self.config, batch_size, length, self.objective.penalty, state_is_spared)

    def _evaluate(self, batch: dict[str, Any], depths: list[int]) -> dict[str, Any]:
        preds = predictions_at_depths(self.model, batch["input_ids"], depths, batch.get("attention_mask"))
        outputs = {
            "depths": torch.tensor(depths),
            "depth_preds": preds,
            "labels": batch["labels"],
            "mean_depth": self.objective.depth_sampler.mean,
        }
        return outputs | {name: batch[name] for name in ("index", "split") if name in batch}

    def on_validation_epoch_start(self) -> None:
        """Let an evaluation of its own be logged at the step where training stands."""
        self._log_trained_steps()

    def on_test_epoch_start(self) -> None:
        """Let an evaluation of its own be logged at the step where training stands."""
        self._log_trained_steps()

    def _log_trained_steps(self) -> None:
        # Lightning would log it at step 0. TensorBoard takes a step back for a restart and drops what training logged.
        if self.trainer.state.fn != TrainerFn.FITTING and self._num_trained_steps:
            self.log("step", float(self._num_trained_steps), sync_dist=self.trainer.world_size > 1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the predictions at ``val_depths``."""
        return self._evaluate(batch, self.val_depths)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the predictions at ``test_depths``, and the answers where the batch has prompts.

        ``answers`` int64 ``(K, R, S, N)`` are those to the R ``wanted`` rows of the batch, ``answer_rows`` which they
        are, ``answer_room`` int64 ``(R,)`` how long an answer to each can be; see
        :class:`~looplm.callbacks.graded_answers.GradedAnswers`.
        """
        outputs = self._evaluate(batch, self.test_depths)
        return {**outputs, **self._answer(batch)} if "prompt_ids" in batch else outputs

    @property
    def answer_settings(self) -> dict[str, Any]:
        """What decides the answers of a test beside the weights and the problem."""
        return {
            "depths": self.test_depths,
            "max_new_tokens": self.max_new_tokens,
            "num_samples": self.num_samples,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def _answer(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        wanted = batch.get("wanted")
        rows = torch.arange(len(batch["prompt_ids"])) if wanted is None else wanted.nonzero().squeeze(1).cpu()
        if not len(rows):
            answers = torch.zeros(len(self.test_depths), 0, self.num_samples, 0).long()
            return {"answers": answers, "answer_rows": rows, "answer_room": rows}
        prompts, mask = (batch[name][rows] for name in ("prompt_ids", "prompt_mask"))
        longest, room = int(mask.sum(1).max()), self._room(mask)  # rows that are left may be shorter than the longest
        prompts, mask = (part[:, -longest:].repeat_interleave(self.num_samples, 0) for part in (prompts, mask))
        # A draw is named by the problem and the sample: the batch around it changes nothing.
        keys = batch["index"][rows].cpu().repeat_interleave(self.num_samples) * self.num_samples
        keys = keys + torch.arange(self.num_samples).repeat(len(rows))
        limits = room.clamp(max=self.max_new_tokens).repeat_interleave(self.num_samples)
        answers = generate_at_depths(
            self.model,
            prompts,
            depths=self.test_depths,
            max_new_tokens=int(limits.max()),
            end_id=batch["end_id"],
            attention_mask=mask,
            temperature=self.temperature,
            seed=self.seed,
            row_keys=keys,
            row_limits=limits,
        )
        answers = answers.unflatten(1, (len(rows), self.num_samples))
        return {"answers": answers, "answer_rows": rows, "answer_room": room}

    def _room(self, mask: Tensor) -> Tensor:
        """Return how long a continuation of each prompt can be, ``(B,)``; its last token takes no position."""
        return self.model.config.max_positions + 1 - (mask != 0).sum(1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return greedy continuations at ``predict_depth``, int64 ``(B, N)``."""
        limits = self._room(batch["attention_mask"]).clamp(max=self.max_new_tokens)
        return generate_at_depths(
            self.model,
            batch["input_ids"],
            depths=[self.predict_depth],
            max_new_tokens=int(limits.max()),
            end_id=batch["end_id"],
            attention_mask=batch["attention_mask"],
            row_limits=limits,
        )[0]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser and its schedule over the run's optimiser steps.

        Raises:
            InputError: If the run has no last step, or the optimiser refuses its options.
        """
        try:
            optimizer = self.optimizer(self.named_parameters())
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"`model.optimizer` cannot be built: {' '.join(str(error).split())}") from error
        max_steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(max_steps) or max_steps < 1:
            raise InputError(
                f"`trainer.max_steps` must be >= 1, since the training stream has no end, got {self.trainer.max_steps}."
            )

        def factor(step: int) -> float:
            return self.lr_schedule.factor(step, int(max_steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where the model came from, so that ``export`` can give it back under its original names."""
        checkpoint.update(pack_origin(self.model.origin))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture.

        Raises:
            InputError: Names the fields, or the tensors, that differ.
        """
        saved = dict(checkpoint.get("hyper_parameters", {}).get("config", {}))
        with contextlib.suppress(ValueError, TypeError):  # fields that are newer than the checkpoint have their default
            saved = LoopedConfig.from_dict(saved).to_dict()
        here = self.model.config.to_dict()
        differing = [
            f"`{name}` {saved.get(name)!r} there, {here.get(name)!r} here"
            for name in sorted(saved.keys() | here.keys())
            if saved.get(name) != here.get(name)
        ]
        if differing:
            raise InputError(f"the checkpoint is of another architecture: {'; '.join(differing)}.")
        weights = checkpoint.get("state_dict", {})  # a sharded checkpoint has none here
        unmatched = sorted(weights.keys() ^ self.state_dict().keys())
        if weights and unmatched:
            raise InputError(
                f"the checkpoint's weights are not those of its architecture: {unmatched} on one side only."
            )
        self._num_trained_steps = int(checkpoint.get("global_step", 0))
