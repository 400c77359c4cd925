"""Compiled core blocks: the same losses and gradients, a number of graphs that depths do not change."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from looplm import (
    FixedDepth,
    JacobianPenalty,
    LogNormalDepth,
    LoopedConfig,
    LoopedTransformer,
    LoopLM,
    STARSObjective,
    generate,
)
from looplm.cli import main
from looplm.compilation import check_compiler
from looplm.errors import InputError
from looplm.randomness import StepKey

SIZE: dict[str, Any] = {"vocab_size": 11, "max_positions": 12, "width": 32, "num_heads": 2, "ffn_width": 48}
TOKENS = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _pair(backend: str, **fields: Any) -> tuple[LoopedTransformer, LoopedTransformer]:
    torch.manual_seed(0)
    eager = LoopedTransformer(LoopedConfig(**{**SIZE, "dropout": 0.0, **fields}))
    compiled = LoopedTransformer(eager.config)
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_core(backend)
    return eager, compiled


def _num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _train(
    model: LoopedTransformer, objective: STARSObjective, num_steps: int, batch: dict[str, torch.Tensor] = BATCH
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(num_steps):
        loss = objective(model, batch, StepKey(seed=0, micro_batch=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_depths_give_the_losses_of_the_eager_run_and_few_graphs(backend: str) -> None:
    eager, compiled = _pair(backend, num_core_layers=2)
    objective = STARSObjective(
        depth_sampler=LogNormalDepth(mu=1.7, sigma=0.7, min_depth=1, max_depth=40),
        backprop_loops=4,
        penalty=JacobianPenalty(fraction=0.25),
        penalty_weight=0.1,
    )
    depths = {objective.depth_sampler.sample(StepKey(seed=0, micro_batch=step)) for step in range(200)}
    assert len(depths) > 15
    losses = _train(compiled, objective, 10)
    after_ten = _num_graphs()
    assert 1 <= after_ten <= 5
    losses += _train(compiled, objective, 200)
    assert _num_graphs() == after_ten
    expected = _train(eager, objective, 10) + _train(eager, objective, 200)
    # Rounding grows with the steps; a wrong graph would show in the first of them.
    assert losses[:10] == pytest.approx(expected[:10], rel=1e-4)
    assert losses == pytest.approx(expected, rel=0.05)


def test_random_depths_with_spared_positions_compile_few_graphs() -> None:
    eager, compiled = _pair("aot_eager")
    objective = STARSObjective(
        depth_sampler=LogNormalDepth(mu=1.7, sigma=0.7, min_depth=1, max_depth=40),
        backprop_loops=4,
        spare_unlabelled=True,
        penalty=JacobianPenalty(fraction=0.25),
        penalty_weight=0.1,
    )
    batch = {"input_ids": TOKENS, "labels": TOKENS.masked_fill(torch.arange(6) < 4, -100)}
    losses = _train(compiled, objective, 10, batch)
    assert losses == pytest.approx(_train(eager, objective, 10, batch), rel=1e-4)
    after_ten = _num_graphs()
    assert 1 <= after_ten <= 5
    _train(compiled, objective, 50, batch)
    assert _num_graphs() == after_ten


@pytest.mark.parametrize("method", ["finite_difference", "jvp", "vjp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_product_has_the_gradient_of_the_eager_run(backend: str, method: Any) -> None:
    gradients = []
    for model in _pair(backend):
        objective = STARSObjective(
            depth_sampler=FixedDepth(3), penalty=JacobianPenalty(method=method), penalty_weight=1.0
        )
        objective(model, BATCH, StepKey(seed=0, micro_batch=0)).loss.backward()
        gradients.append([p.grad for p in model.core.parameters()])
    assert _num_graphs() > 0
    for wanted, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_checkpointed_loops_are_compiled_in_both_passes() -> None:
    gradients = []
    for model in _pair("aot_eager"):
        objective = STARSObjective(depth_sampler=FixedDepth(7), checkpoint_loops="sqrt")
        objective(model, BATCH, StepKey(seed=0, micro_batch=0)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for wanted, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_core_layers", [1, 2])
def test_spared_positions_have_the_gradient_of_the_eager_run(num_core_layers: int) -> None:
    batch = {"input_ids": TOKENS, "labels": TOKENS.masked_fill(torch.arange(6) < 4, -100)}
    gradients = []
    for model in _pair("aot_eager", num_core_layers=num_core_layers):
        objective = STARSObjective(depth_sampler=FixedDepth(3), spare_unlabelled=True)
        out = objective(model, batch, StepKey(seed=0, micro_batch=0))
        out.loss.backward()
        assert out.num_queries == 2 * len(TOKENS)
        gradients.append([p.grad for p in model.parameters()])
    assert _num_graphs() > 0
    for wanted, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "padding", "length"),
    [
        ({}, None, 6),
        ({"num_kv_heads": 1, "positions": "rotary"}, None, 6),
        ({}, "left", 6),
        ({}, "documents", 6),
        ({"max_positions": 40}, None, 40),  # longer than what is computed operation by operation
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_over_few_and_many_keys_is_the_eager_one(
    backend: str, fields: dict[str, Any], padding: str | None, length: int
) -> None:
    tokens = torch.randint(11, (8, length), generator=torch.Generator().manual_seed(1))
    masks = {"left": torch.arange(length) >= torch.arange(8)[:, None] % 4, "documents": torch.arange(length) // 3 + 1}
    mask = masks[padding].long().expand(8, length) if padding else torch.ones(8, length).long()
    batch = {"input_ids": tokens, "labels": tokens.masked_fill(mask == 0, -100), "attention_mask": mask}
    outputs = []
    for model in _pair(backend, **fields):
        out = STARSObjective(depth_sampler=FixedDepth(3))(model, batch, StepKey(seed=0, micro_batch=0))
        out.loss.backward()
        outputs.append((out.loss, [p.grad for p in model.parameters() if p.grad is not None]))
    assert _num_graphs() > 0
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-6)


def test_compiled_attention_drops_as_many_as_it_should() -> None:
    dropped = []
    for model in _pair("aot_eager", dropout=0.5):
        torch.manual_seed(0)
        state = model.embed(torch.zeros(400, 6, dtype=torch.long))
        dropped.append(torch.stack([model.step(state).hidden.std() for _ in range(3)]).mean().item())
    assert dropped[1] == pytest.approx(dropped[0], rel=0.05)


def test_evaluation_and_generation_compile_nothing() -> None:
    eager, compiled = (model.eval() for model in _pair("aot_eager"))
    with torch.no_grad():
        assert torch.equal(compiled(TOKENS, 5), eager(TOKENS, 5))
    options: dict[str, Any] = {"num_loops": 3, "max_new_tokens": 4, "end_id": -1}
    assert torch.equal(generate(compiled, TOKENS, **options), generate(eager, TOKENS, **options))
    assert _num_graphs() == 0


def test_weights_keep_their_names() -> None:
    eager, compiled = _pair("aot_eager")
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def _losses(folder: Path) -> dict[int, float]:
    with (folder / "csv" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def test_a_compiled_run_is_the_eager_run_and_its_checkpoints_are_exchanged(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    def fit(name: str, max_steps: int, *more: str) -> dict[int, float]:
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / name), "name": "csv"}}
        logger["init_args"]["version"] = ""
        options = {"default_root_dir": str(tmp_path / name), "max_steps": max_steps, "logger": logger}
        config = write_config(name, **{f"trainer__{key}": value for key, value in options.items()})
        assert main(["fit", "--config", str(config), *more]) == 0
        return _losses(tmp_path / name)

    compile_it = "--model.compile_backend=aot_eager"
    eager = fit("eager", 4)
    whole = fit("whole", 4, compile_it)
    assert _num_graphs() > 0
    assert list(whole.values()) == pytest.approx(list(eager.values()), rel=1e-4)
    fit("half", 2, compile_it)
    checkpoint = str(tmp_path / "half" / "checkpoints" / "last.ckpt")
    resume = f"--ckpt_path={checkpoint}"
    resumed = {"on": fit("on", 4, resume, compile_it), "off": fit("off", 4, resume)}
    assert list(resumed["on"]) == [2, 3]
    assert resumed["on"] == pytest.approx(resumed["off"], rel=1e-4)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`compile_backend` must be one of .*inductor.* or null, got 'fast'"):
        LoopLM(LoopedConfig(**SIZE), compile_backend="fast")


def test_a_missing_compiler_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler on a CPU, and no-such-compiler cannot be found"):
        check_compiler("inductor", torch.device("cpu"))
    check_compiler("inductor", torch.device("cuda"))
