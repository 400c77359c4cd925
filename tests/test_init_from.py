"""``fit`` from pretrained weights: what is taken over, what is refused, and the way back out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from looplm import ArithmeticDataModule, FixedDepth, LoopedConfig, LoopLM, STARSObjective
from looplm.checkpoints import from_pretrained, load_checkpoint, save_checkpoint, save_pretrained
from looplm.cli import main
from looplm.errors import InputError
from looplm.model import LoopedTransformer, Origin

OURO = replace(
    LoopedConfig.ouro_1_4b(), vocab_size=64, max_positions=24, width=16, num_heads=2, ffn_width=24, num_core_layers=2
)
CONFIG = """\
trainer:
  max_steps: 3
  val_check_interval: 3
  check_val_every_n_epoch: null
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  enable_model_summary: false
model:
  objective: {depth_sampler: {class_path: FixedDepth, init_args: {depth: 2}}}
  val_depths: [1, 2]
  test_depths: [1, 2]
data:
  class_path: ArithmeticDataModule
  init_args: {min_digits: 1, max_digits: 2, batch_size: 4, num_val: 8, num_test: 8}
"""


@pytest.fixture
def ouro(tmp_path: Path) -> Path:
    folder = tmp_path / "ouro"
    torch.manual_seed(0)
    model = LoopedTransformer(OURO)
    save_pretrained(model, folder, origin=Origin(config={}, files={"tokenizer.json": b"{}"}), num_loops=4)
    return folder


def _fit(root: Path, source: Path | str, *options: str, command: str = "fit") -> int:
    config = root.parent / "config.yaml"
    config.write_text(CONFIG)
    return main(
        [
            command,
            f"--config={config}",
            f"--trainer.default_root_dir={root}",
            f"--model.init_from={source}",
            *options,
        ]
    )


def test_a_run_starts_from_the_directorys_weights_and_architecture(ouro: Path) -> None:
    data = ArithmeticDataModule()
    config = LoopedConfig(vocab_size=data.vocab_size, max_positions=data.max_positions)
    module = LoopLM(config, init_from=str(ouro))
    loaded = from_pretrained(ouro)
    assert module.model.config == replace(loaded.config, dropout=config.dropout)
    assert module.hparams["config"] == module.model.config.to_dict()
    theirs = loaded.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.model.state_dict().items())
    assert all(part.training for part in module.modules())
    assert {name for name, p in module.model.named_parameters() if not p.requires_grad} == {
        "exit_gate.weight",
        "exit_gate.bias",
    }
    other = LoopLM(replace(config, dropout=0.25), init_from=str(ouro))
    assert other.model.config == replace(loaded.config, dropout=0.25)
    assert other.model.dropout.p == 0.25
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in other.model.state_dict().items())


@pytest.mark.parametrize("kind", ["directory", "checkpoint"])
def test_fine_tuned_goes_back_under_its_original_names(kind: str, ouro: Path, tmp_path: Path) -> None:
    source = ouro
    if kind == "checkpoint":
        source = tmp_path / "ouro.ckpt"
        save_checkpoint(from_pretrained(ouro), source)
    assert _fit(tmp_path / "run", source) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["export", str(last), str(tmp_path / "out")]) == 0
    before, after = load_file(ouro / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == before.keys() - {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    fields = [json.loads((folder / "config.json").read_text()) for folder in (ouro, tmp_path / "out")]
    assert fields[0] == fields[1]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"


def test_a_run_goes_on_and_is_tested_without_what_it_started_from(ouro: Path, tmp_path: Path) -> None:
    root, architecture = tmp_path / "run", from_pretrained(ouro).config
    assert _fit(root, ouro) == 0
    shutil.rmtree(ouro)
    assert _fit(root, ouro, command="test") == 0
    assert _fit(root, ouro, "--ckpt_path=last", "--trainer.max_steps=5") == 0
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert str(ouro) in (root / "config.yaml").read_text()  # where it came from stays on record
    assert load_checkpoint(root / "checkpoints" / "last.ckpt").config == replace(architecture, dropout=0.1)


def test_dropout_is_the_runs_own_and_a_line_says_what_is_not(ouro: Path, caplog: pytest.LogCaptureFixture) -> None:
    for dropout in (0.1, 0.25):  # the first is the default
        asked = LoopedConfig(vocab_size=8, max_positions=8, dropout=dropout)
        with caplog.at_level("INFO"):
            assert LoopLM(asked, init_from=str(ouro)).model.core[0].attention.dropout == dropout
        (line,) = [record.getMessage() for record in caplog.records if str(ouro) in record.getMessage()]
        assert "width 16" in line
        assert line.endswith(f"dropout {dropout} as in `model.config`")
        caplog.clear()


def test_one_line_says_what_does_not_fit(ouro: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (("--model.config.width=32",), ("`width` 16, got 32", str(ouro))),
        (("--data.init_args.max_digits=9",), ("`max_positions` at most 24, got",)),
    ):
        assert _fit(tmp_path / "run", ouro, *options) == 2
        error = capfd.readouterr().err
        assert all(word in error for word in words), error
        assert "Traceback" not in error
    assert _fit(tmp_path / "run", tmp_path / "nowhere") == 2
    assert "nowhere" in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_of_a_replaced_file_stay(ouro: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.ckpt"
    save_checkpoint(from_pretrained(ouro), source)
    module = LoopLM(LoopedConfig(vocab_size=8, max_positions=8), init_from=str(source))
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    source.write_bytes(bytes(source.stat().st_size))  # in place: a mapped file would change under the model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


def test_half_precision_weights_are_trained_in_float32(ouro: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    save_pretrained(from_pretrained(ouro, dtype=torch.bfloat16), folder, num_loops=4)
    module = LoopLM(LoopedConfig(vocab_size=8, max_positions=8), init_from=str(folder))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_few_steps_lower_the_loss_of_a_pretrained_model(ouro: Path, tmp_path: Path) -> None:
    data = ArithmeticDataModule(min_digits=1, max_digits=1, batch_size=16)
    config = LoopedConfig(vocab_size=data.vocab_size, max_positions=data.max_positions)
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):  # type: ignore[no-untyped-def]
            losses.append(float(outputs["loss"]))

    module = LoopLM(
        config, STARSObjective(depth_sampler=FixedDepth(2)), lambda p: torch.optim.AdamW(p, 0.02), init_from=str(ouro)
    )
    trainer = L.Trainer(
        max_steps=30,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[Losses()],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@given(field=st.sampled_from(["width", "ffn_width", "num_core_layers", "norm_eps"]), change=st.integers(1, 5))
def test_a_field_that_is_neither_default_nor_the_weights_is_refused(field: str, change: int) -> None:
    there = LoopedConfig.ouro_1_4b()
    asked = LoopedConfig(vocab_size=8, max_positions=8, **{field: getattr(there, field) + 8 * change * 16})
    with pytest.raises(ValueError, match=f"`{field}`"):
        asked.for_weights(there)


def test_a_missing_directory_is_named() -> None:
    with pytest.raises(InputError, match="no/such/dir"):
        LoopLM(LoopedConfig(vocab_size=8, max_positions=8), init_from="no/such/dir")
