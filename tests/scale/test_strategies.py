"""Two processes and accumulated micro-batches give the weights of one process that sees all; so does every resume."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import run_looplm
from processes import BASE, TWO_ON_CPU
from torch import Tensor

from looplm import ArithmeticDataModule, JacobianPenalty, LoopedConfig, LoopLM, STARSObjective, UniformDepth
from looplm.cli import main
from looplm.durable import draft_of
from looplm.randomness import StepKey
from looplm.stability.products import ProductName

SEED = BASE["seed_everything"]
STEPS = BASE["trainer"]["max_steps"]
MODEL = BASE["model"]


def reference(
    num_ranks: int,
    accumulate: int,
    method: ProductName,
    dtype: torch.dtype = torch.float32,
    backprop_loops: int | None = 3,
) -> list[dict[str, Tensor]]:
    """Return the weights before and after each step, computed without Lightning in this process."""
    data = ArithmeticDataModule(**BASE["data"]["init_args"], seed=SEED)
    config = LoopedConfig(vocab_size=data.vocab_size, max_positions=data.max_positions, **MODEL["config"])
    module = LoopLM(config, seed=SEED).to(dtype)
    objective = STARSObjective(
        depth_sampler=UniformDepth(1, 5),
        backprop_loops=backprop_loops,
        penalty=JacobianPenalty(method=method),
        penalty_weight=0.2,
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)

    def weights() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    found = [weights()]
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = {
            (micro_batch, rank): data.training_batch(micro_batch, optimizer_step=step, rank=rank, world_size=num_ranks)
            for micro_batch in range(step * accumulate, (step + 1) * accumulate)
            for rank in range(num_ranks)
        }
        labelled = [(batch["labels"] != -100).sum() for batch in batches.values()]
        assert len(set(map(int, labelled))) > 1 or step > 0  # else a mean of means would do
        for (micro_batch, rank), batch in batches.items():
            key = StepKey(seed=SEED, micro_batch=micro_batch, optimizer_step=step, rank=rank)
            loss = objective(module.model, batch, key, torch.stack(labelled).float().mean()).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), BASE["trainer"]["gradient_clip_val"])
        optimizer.step()
        found.append(weights())
    return found


def saved(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"epoch=0-step={step}.ckpt", weights_only=True)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


DDP = ["--config", "conf/overlays/ddp.yaml", *TWO_ON_CPU]
FSDP = ["--config", "conf/overlays/fsdp.yaml", *TWO_ON_CPU]
TWICE = "--trainer.accumulate_grad_batches=2"
METHOD = "--model.objective.penalty.init_args.method"
# Processes, micro-batches a step, options, product.
RUNS: dict[str, tuple[int, int, list[str], ProductName]] = {
    "ddp": (2, 1, DDP, "finite_difference"),
    "fsdp": (2, 1, FSDP, "finite_difference"),
    "accumulation": (1, 2, [TWICE], "finite_difference"),
    "fsdp-accumulation": (2, 2, [*FSDP, TWICE], "finite_difference"),
    "ddp-jvp": (2, 1, [*DDP, f"{METHOD}=jvp"], "jvp"),
    "fsdp-vjp": (2, 1, [*FSDP, f"{METHOD}=vjp"], "vjp"),
}


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the run directory of a strategy; each is run once."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            num_ranks, _, options, method = RUNS[name]
            argv = ["fit", "--config", base, *options, f"--trainer.default_root_dir={folder}"]
            said = run_looplm(*argv, num_ranks=num_ranks)
            reason = "asked for; right under" if f"{METHOD}={method}" in options else "chosen for"
            assert f"penalty: product {method}, {reason}" in said
            done[name] = folder
        return done[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_one_process_that_sees_every_sample(name: str, trained: Any) -> None:
    num_ranks, accumulate, _, method = RUNS[name]
    folder, expected = trained(name), reference(num_ranks, accumulate, method)
    gradients = [
        {key: (before[key] - after[key]) / 0.2 for key in before}
        for before, after in ((expected[0], expected[1]), (expected[0], saved(folder, 1)["state_dict"]))
    ]
    norm = math.sqrt(sum(value.square().sum().item() for value in gradients[0].values()))
    assert norm == pytest.approx(0.3, rel=1e-4)  # it was clipped, over all shards together
    assert largest_difference(*gradients) <= 1e-5
    for step in range(1, STEPS + 1):
        assert largest_difference(saved(folder, step)["state_dict"], expected[step]) <= 1e-5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("precision", "method", "dtype", "tolerance"),
    [("bf16-mixed", "finite_difference", torch.float32, 0.02), ("bf16-true", "jvp", torch.bfloat16, 0.1)],
)
def test_narrow_steps_go_where_those_of_one_process_go(
    strategy: str, precision: str, method: ProductName, dtype: torch.dtype, tolerance: float, base: Path, tmp_path: Path
) -> None:
    options = [*RUNS[strategy][2], "--config", f"conf/overlays/{precision}.yaml"]
    said = run_looplm("fit", "--config", base, *options, f"--trainer.default_root_dir={tmp_path}", num_ranks=2)
    assert f"penalty: product {method}, chosen for" in said
    first, *_, expected = reference(2, 1, method, dtype)
    found = saved(tmp_path, STEPS)["state_dict"]
    assert {weight.dtype for weight in found.values()} == {dtype}
    off, moved = (
        math.sqrt(sum((weights[key].double() - expected[key].double()).square().sum().item() for key in expected))
        for weights in (found, first)
    )
    assert off <= tolerance * moved


def test_weights_too_coarse_for_the_learning_rate_are_told(base: Path, tmp_path: Path) -> None:
    for lr, is_told in (("1e-6", True), ("0.2", False)):
        options = [f"--model.optimizer.init_args.lr={lr}", f"--trainer.default_root_dir={tmp_path / lr}"]
        said = run_looplm("fit", "--config", base, "--config", "conf/overlays/bf16-true.yaml", *options)
        assert (
            bool(re.search(r"9\d% of the weights are too large to move: at `trainer.precision` bf16-true", said))
            == is_told
        )


def test_mean_over_ranks_is_the_mean_over_all_tokens() -> None:
    data = ArithmeticDataModule(**BASE["data"]["init_args"])
    config = LoopedConfig(vocab_size=data.vocab_size, max_positions=data.max_positions, **MODEL["config"])
    model, objective = LoopLM(config).model, STARSObjective(depth_sampler=UniformDepth(1, 5))
    parts = [data.training_batch(0, rank=rank, world_size=2) for rank in range(2)]
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    assert counts[0] != counts[1]
    keys = [StepKey(seed=0, micro_batch=0, rank=rank) for rank in range(2)]
    mean = torch.tensor(sum(counts) / 2)
    split = [objective(model, part, key, mean).loss for part, key in zip(parts, keys, strict=True)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels", "attention_mask")}
    assert (sum(split) / 2).item() == pytest.approx(objective(model, whole, keys[0]).loss.item(), rel=1e-6)


@pytest.mark.parametrize(("before", "after"), [("ddp", "one"), ("fsdp", "one"), ("one", "fsdp")])
def test_run_goes_on_with_another_number_of_processes(
    base: Path, tmp_path: Path, trained: Any, before: str, after: str
) -> None:
    # Without a penalty nothing but the samples depends on the rank: batches of 4 on two are batches of 8 on one.
    plain = ["--model.objective.penalty=null", "--model.objective.penalty_weight=0"]
    one = ["fit", "--config", base, *plain, "--data.batch_size=8"]
    two = {name: ["fit", "--config", base, *RUNS[name][2], *plain, "--data.batch_size=4"] for name in ("ddp", "fsdp")}
    commands, num_ranks = {"one": one, **two}, {"one": 1, "ddp": 2, "fsdp": 2}
    folder, whole = tmp_path / "cut", tmp_path / "whole"
    here = f"--trainer.default_root_dir={folder}"
    run_looplm(*commands[before], "--trainer.max_steps=2", here, num_ranks=num_ranks[before])
    run_looplm(*commands[after], "--ckpt_path=last", here, num_ranks=num_ranks[after])
    assert main([str(part) for part in [*one, f"--trainer.default_root_dir={whole}"]]) == 0
    last, expected = saved(folder, STEPS), saved(whole, STEPS)
    assert largest_difference(last["state_dict"], expected["state_dict"]) <= 1e-5
    # Momentum, too, was carried over.
    momenta = [state["optimizer_states"][0]["state"] for state in (last, expected)]
    assert momenta[0].keys() == momenta[1].keys()
    for number, state in momenta[0].items():
        torch.testing.assert_close(state["momentum_buffer"], momenta[1][number]["momentum_buffer"], atol=1e-5, rtol=0)


def test_muon_sees_whole_matrices_where_parameters_are_sharded(base: Path, tmp_path: Path) -> None:
    # Without a penalty nothing but the samples depends on the rank: batches of 4 on two are batches of 8 on one.
    argv = ["fit", "--config", base, "--model.objective.penalty=null", "--model.objective.penalty_weight=0"]
    # A bias of keys has no gradient but rounding, which AdamW would make steps of.
    argv += ["--model.optimizer=MuonAdamW", "--model.optimizer.lr=0.02", "--model.config.use_bias=false"]
    two = ["--config", "conf/overlays/fsdp.yaml", *TWO_ON_CPU, "--data.batch_size=4"]
    run_looplm(*argv, *two, f"--trainer.default_root_dir={tmp_path / 'two'}", num_ranks=2)
    one = [*argv, "--data.batch_size=8", f"--trainer.default_root_dir={tmp_path / 'one'}"]
    assert main([str(part) for part in one]) == 0
    found, expected = (saved(tmp_path / name, STEPS)["state_dict"] for name in ("two", "one"))
    assert largest_difference(found, expected) <= 1e-5


def test_sharded_checkpoint_becomes_the_file_that_one_process_would_have_written(
    base: Path, tmp_path: Path, trained: Any
) -> None:
    folder, file = tmp_path / "run", tmp_path / "one.ckpt"
    shards = ["--trainer.strategy.init_args.save_distributed_checkpoint=true", "--checkpoint.save_top_k=1"]
    argv = ["fit", "--config", base, *RUNS["fsdp"][2], *shards, f"--trainer.default_root_dir={folder}"]
    run_looplm(*argv, num_ranks=2)
    last = folder / "checkpoints" / "last.ckpt"
    assert {path.suffix for path in last.glob("*_0.distcp")} == {".distcp"}
    assert main(["consolidate", str(last), str(file)]) == 0
    found, expected = torch.load(file, weights_only=True), saved(trained("fsdp"), STEPS)
    assert found.keys() == expected.keys()
    assert largest_difference(found["state_dict"], expected["state_dict"]) == 0
    momenta = [content["optimizer_states"][0]["state"] for content in (found, expected)]
    assert momenta[0].keys() == momenta[1].keys()
    assert all(torch.equal(momenta[0][k]["momentum_buffer"], momenta[1][k]["momentum_buffer"]) for k in momenta[0])
    assert main(["test", "--config", str(base), f"--ckpt_path={file}", f"--trainer.default_root_dir={folder}"]) == 0
    assert main(["export", str(file), str(tmp_path / "exported")]) == 0


def test_every_sample_is_validated_once_on_two_sharded_processes(base: Path, tmp_path: Path, trained: Any) -> None:
    # 21 samples on two ranks: the distributed sampler repeats one.
    last = trained("fsdp") / "checkpoints" / "last.ckpt"
    argv = ["test", "--config", str(base), f"--ckpt_path={last}"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*argv, f"--trainer.default_root_dir={one}"]) == 0
    run_looplm(*argv, *RUNS["fsdp"][2], f"--trainer.default_root_dir={two}", num_ranks=2)
    assert (two / "test_curve.csv").read_text() == (one / "test_curve.csv").read_text()
    assert '"num_samples": 21' in (two / "test_summary.json").read_text()


@pytest.mark.parametrize("after", ["one", "ddp"])
def test_sharded_run_goes_on_in_its_directory_with_ordinary_files_and_back(
    base: Path, tmp_path: Path, after: str
) -> None:
    # Without a penalty nothing but the samples depends on the rank: batches of 4 on two are batches of 8 on one.
    plain = ["fit", "--config", base, "--model.objective.penalty=null", "--model.objective.penalty_weight=0"]
    one, two = [*plain, "--data.batch_size=8"], [*plain, "--data.batch_size=4"]
    shards = "--trainer.strategy.init_args.save_distributed_checkpoint=true"
    sharded = [*two, *RUNS["fsdp"][2], shards]
    folder, file, whole = tmp_path / "run", tmp_path / "one.ckpt", tmp_path / "whole"
    here = [f"--trainer.default_root_dir={folder}", "--checkpoint.save_top_k=1"]
    last = folder / "checkpoints" / "last.ckpt"
    draft = draft_of(last)

    run_looplm(*sharded, *here, "--trainer.max_steps=2", num_ranks=2)
    assert last.is_dir()
    assert main(["consolidate", str(last), str(file)]) == 0
    draft.mkdir()  # as a kill leaves it
    # Of two folders one is to be removed, and in the place of one a file is to be written.
    command, num_ranks = {"one": (one, 1), "ddp": ([*two, *RUNS["ddp"][2]], 2)}[after]
    run_looplm(*command, *here, f"--ckpt_path={file}", "--trainer.max_steps=3", num_ranks=num_ranks)
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert sorted(path.name for path in last.parent.iterdir()) == ["epoch=0-step=3.ckpt", "last.ckpt"]

    draft.write_text("as a kill leaves it")
    last.rename(last.with_name(".last.ckpt.old"))  # as another kill does; now both ranks bring it back
    run_looplm(*sharded, *here, "--ckpt_path=last", "--trainer.max_steps=4", num_ranks=2)
    assert last.is_dir()
    assert sorted(path.name for path in last.parent.iterdir()) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    # The strategy itself reads its folders, and writes ordinary files where it is told to.
    run_looplm(*two, *RUNS["fsdp"][2], *here, f"--ckpt_path={last}", num_ranks=2)
    assert main([str(part) for part in [*one, f"--trainer.default_root_dir={whole}"]]) == 0
    expected = saved(whole, STEPS)["state_dict"]
    assert largest_difference(torch.load(last, weights_only=True)["state_dict"], expected) <= 1e-5
