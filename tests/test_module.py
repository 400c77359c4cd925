"""The LightningModule: what it trains, returns, saves and refuses."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm import ArithmeticDataModule, FixedDepth, LoopedConfig, LoopedModel, LoopLM, STARSObjective
from looplm.errors import InputError
from looplm.lr_schedule import LRSchedule

SIZES = {"width": 16, "num_heads": 2, "ffn_width": 32, "dropout": 0.0}


def _data(**options: Any) -> ArithmeticDataModule:
    return ArithmeticDataModule(**{"min_digits": 1, "max_digits": 2, "batch_size": 8, "num_val": 12, **options})


def _module(depth: int = 2, seed: int = 0, architecture: dict[str, Any] | None = None, **options: Any) -> LoopLM:
    data = _data()
    config = LoopedConfig(
        **{"vocab_size": data.vocab_size, "max_positions": data.max_positions, **SIZES, **(architecture or {})}
    )
    return LoopLM(config, STARSObjective(depth_sampler=FixedDepth(depth)), seed=seed, **options)


def _trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "max_steps": 3,
            "limit_val_batches": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )


def test_is_a_looped_model() -> None:
    module = _module()
    assert isinstance(module, LoopedModel)
    state = module.embed(torch.ones(2, 5, dtype=torch.long))
    assert module.step(state).depth == 1
    assert module.decode(state).shape == (2, 5, _data().vocab_size)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = _module(seed=3).state_dict()
    torch.manual_seed(2)
    second = _module(seed=3).state_dict()
    other = _module(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.token_embedding.weight"], other["model.token_embedding.weight"])


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    _module(seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    module = _module(optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3))
    _trainer(tmp_path, max_steps=40, callbacks=[Losses()]).fit(module, datamodule=_data(batch_size=32))
    assert losses[0] == pytest.approx(math.log(_data().vocab_size), rel=0.1)
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def test_training_logs_what_a_run_is_judged_by(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.fit(_module(depth=3), datamodule=_data())
    names = ("loss", "cross_entropy", "depth", "exact_match", "penalty_weight", "learning_rate")
    assert {f"train/{name}" for name in names} <= trainer.callback_metrics.keys()
    assert float(trainer.callback_metrics["train/depth"]) == 3.0


def test_evaluation_steps_predict_every_token_at_each_depth() -> None:
    data, module = _data(), _module(val_depths=[1, 3], test_depths=[0, 2, 5]).eval()
    batch = next(iter(data.val_dataloader()))
    for outputs, depths in (
        (module.validation_step(batch, 0), [1, 3]),
        (module.test_step({**batch, "split": "hard"}, 0), [0, 2, 5]),
    ):
        assert outputs["depths"].tolist() == depths
        for row, depth in zip(outputs["depth_preds"], depths, strict=True):
            state = module.embed(batch["input_ids"], batch["attention_mask"])
            for _ in range(depth):
                state = module.step(state)
            assert torch.equal(row, module.decode(state).argmax(-1))
        assert outputs["labels"] is batch["labels"]
        assert outputs["index"] is batch["index"]
        assert outputs["mean_depth"] == 2.0
    assert outputs["split"] == "hard"


@pytest.mark.parametrize("max_new_tokens", [4, 100])  # the second meets the model's last position
def test_prediction_does_not_depend_on_its_neighbours_in_the_batch(tmp_path: Path, max_new_tokens: int) -> None:
    (tmp_path / "problems").write_text("1+2\n31+42\n5+77\n")
    module = _module(predict_depth=3, max_new_tokens=max_new_tokens).eval()

    def answers(batch_size: int) -> list[str]:
        data = _data(eval_batch_size=batch_size, predict_file=str(tmp_path / "problems"))
        data.setup("predict")
        return data.predicted_lines(module.predict_step(batch, 0) for batch in data.predict_dataloader())

    assert answers(1) == answers(3)


def test_prediction_stays_within_the_table_of_positions(tmp_path: Path) -> None:
    (tmp_path / "problems").write_text("31+42\n")
    data = _data(predict_file=str(tmp_path / "problems"))
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    generated = _module(max_new_tokens=100).eval().predict_step(batch, 0)
    # The last token of an answer is never read.
    assert batch["input_ids"].shape[1] + generated.shape[1] - 1 <= data.max_positions


def test_checkpoint_holds_plain_data_and_the_architecture_alone(tmp_path: Path) -> None:
    module = _module()
    trainer = _trainer(tmp_path)
    trainer.fit(module, datamodule=_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"config": module.model.config.to_dict()}

    restored = LoopLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert restored.model.config == module.model.config
    assert all(torch.equal(restored.state_dict()[name], value) for name, value in module.state_dict().items())


def test_checkpoint_of_another_architecture_is_refused_by_field(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.fit(_module(), datamodule=_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    # norm_placement changes no tensor's shape: loading the weights alone would not fail.
    other = _module(architecture={"norm_placement": "pre_norm", "ffn_width": 64})
    with pytest.raises(InputError, match="`ffn_width` 32 there, 64 here; `norm_placement` 'sandwich_dual' there"):
        _trainer(tmp_path, max_steps=5).fit(other, datamodule=_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_learning_rate_follows_the_schedule_in_optimiser_steps(tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    schedule = LRSchedule(warmup_steps=2, min_ratio=0.1)
    module = _module(lr_schedule=schedule, optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    _trainer(tmp_path, max_steps=5, accumulate_grad_batches=2, callbacks=[Rates()]).fit(module, datamodule=_data())
    assert rates == pytest.approx([0.5 * schedule.factor(step, 5) for step in range(5)])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.integers(1, 50), st.floats(0, 1))
def test_schedule_rises_to_the_full_rate_then_falls_to_its_floor(warmup: int, rest: int, min_ratio: float) -> None:
    schedule, max_steps = LRSchedule(warmup_steps=warmup, min_ratio=min_ratio), warmup + rest
    factors = [schedule.factor(step, max_steps) for step in range(max_steps + 5)]
    rise, fall = factors[:warmup], factors[warmup:]
    assert rise == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert fall[0] == pytest.approx(1.0)
    assert all(a >= b - 1e-12 for a, b in pairwise(fall))
    assert factors[max_steps:] == pytest.approx([min_ratio] * 5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"val_depths": []}, "`val_depths`"),
        ({"val_depths": [4, 2]}, "`val_depths`"),
        ({"test_depths": [-1]}, "`test_depths`"),
        ({"test_depths": [2, 2]}, "`test_depths`"),
        ({"predict_depth": -1}, "`predict_depth`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
    ],
)
def test_value_outside_its_range_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _module(**options)


@pytest.mark.parametrize(
    ("options", "named"), [({"warmup_steps": -1}, "`warmup_steps`"), ({"min_ratio": 1.5}, "`min_ratio`")]
)
def test_schedule_outside_its_range_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LRSchedule(**options)


def test_sparing_unlabelled_positions_is_refused_where_a_coda_reads_every_state() -> None:
    config = LoopedConfig(vocab_size=11, max_positions=8, width=16, num_heads=2, ffn_width=32, num_coda_layers=2)
    with pytest.raises(ValueError, match=r"`objective.spare_unlabelled` has no effect with a coda.*got .* 2"):
        LoopLM(config, STARSObjective(depth_sampler=FixedDepth(1), spare_unlabelled=True))
