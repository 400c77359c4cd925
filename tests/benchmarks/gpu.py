"""On one CUDA device: how well a large model's training step uses it, a whole run of the paper, cached generation.

Every function takes the device and the size: a CPU runs the same code at a small one.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import Tensor

from looplm.config import LoopedConfig
from looplm.depth import FixedDepth
from looplm.flops import penalty_flops, training_flops
from looplm.generation import generate
from looplm.loop import SegmentLength
from looplm.model import LoopedTransformer
from looplm.objective import STARSObjective
from looplm.randomness import StepKey
from looplm.stability.penalty import JacobianPenalty

from .timing import Measurement, Row, ratio_of, timed

__all__ = [
    "GenerationSize",
    "StepSize",
    "StepTimes",
    "first_that_fits",
    "generation_row",
    "gpu_rows",
    "mfu_row",
    "peak_flops",
    "run_row",
    "step_times",
]

ROOT = Path(__file__).parents[2]
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """A training step on packed rows, a label at every token."""

    config: LoopedConfig
    batch_size: int
    length: int = 2048
    num_loops: int = 4
    checkpoint_loops: SegmentLength | None = None
    backend: str = "inductor"

    def penalty(self) -> JacobianPenalty:
        """The penalty on one sequence; the weights are bfloat16, which finite differences refuse."""
        return JacobianPenalty(method="jvp", fraction=1 / self.batch_size)

    def flops(self, with_penalty: bool) -> int:
        shape = (self.config, self.batch_size, self.length)
        return training_flops(*shape, self.num_loops) + (penalty_flops(*shape, self.penalty()) if with_penalty else 0)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Steps of one size: seconds of each."""

    size: StepSize
    with_penalty: bool
    seconds: list[float]


@dataclass(frozen=True, kw_only=True)
class GenerationSize:
    """A batch that is continued."""

    config: LoopedConfig
    num_rows: int = 32
    num_loops: int = 8
    prompt_length: int = 64
    new_tokens: int = 448


# Memory, counted on a block of this shape: compiled, it keeps 21.5 bfloat16 numbers a token and feature, so a sequence
# of 2,048 keeps 17 GB in 24 blocks and 4 loops, and up to 1.4 GB of logits. Weights, gradients and both moments take
# 11.5 GB. What `jvp` keeps of one sequence for its gradient: 53 GB, most of it attention's float32 matrices of 2,048².
# Two sequences need 49 GB, four 87; with the penalty three need 119 GB, four 138. A loop at a time eight need 58 GB for
# the loss and, earlier, 71 for the penalty: on a card of 80 GB the penalty asks for checkpoints.
_OURO = LoopedConfig.ouro_1_4b()
_WITHOUT = [StepSize(config=_OURO, batch_size=4), StepSize(config=_OURO, batch_size=2)]
_WITH = [
    StepSize(config=_OURO, batch_size=4),
    StepSize(config=_OURO, batch_size=3),
    StepSize(config=_OURO, batch_size=8, checkpoint_loops=1),
    StepSize(config=_OURO, batch_size=4, checkpoint_loops=1),
]
# With a cache a token takes what it takes to launch some 400 kernels, whatever the width: it has to be worth them.
_GENERATION = GenerationSize(
    config=LoopedConfig(
        vocab_size=256,
        max_positions=512,
        width=1024,
        num_heads=16,
        ffn_width=4096,
        positions="rotary",
        tie_embeddings=False,
        init_std=0.03,
        dropout=0.0,
    )
)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no CUDA


def first_that_fits(prepare: Callable[[S], T], sizes: Sequence[S]) -> tuple[S, T]:
    """Prepare one size after the other until the memory is enough; return it and what was prepared."""
    for size in sizes[:-1]:
        try:
            return size, prepare(size)
        except torch.OutOfMemoryError:
            pass
        _free()  # not above, where the error still holds the tensors
    return sizes[-1], prepare(sizes[-1])


def peak_flops(device: torch.device, size: int = 8192, num_products: int = 20, num_rounds: int = 10) -> float:
    """Return the FLOPs by second of square bfloat16 matrix products, the best of several rounds."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def run() -> None:
        for _ in range(num_products):
            torch.mm(left, right, out=out)
        _finish(device)

    run()  # warm up
    return num_products * 2 * size**3 / min(timed(run)[0] for _ in range(num_rounds))


def _training_step(device: torch.device, size: StepSize, with_penalty: bool) -> Callable[[], Tensor]:
    """Return a whole step, which has run twice: forward, backward, optimiser; weights and moments in bfloat16."""
    torch._dynamo.reset()  # a second batch size would be compiled as one that changes
    torch.manual_seed(0)
    with device:
        model = LoopedTransformer(size.config).bfloat16()
        tokens = torch.randint(size.config.vocab_size, (size.batch_size, size.length + 1))
    model.compile_core(size.backend)  # `jvp` runs the blocks as they are
    batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    objective = STARSObjective(
        depth_sampler=FixedDepth(size.num_loops),
        penalty=size.penalty() if with_penalty else None,
        penalty_weight=0.1 if with_penalty else 0.0,
        checkpoint_loops=size.checkpoint_loops,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = objective(model, batch, StepKey(seed=0, micro_batch=0)).loss
        loss.backward()
        optimizer.step()
        _finish(device)
        return loss.detach()

    run(), run()  # the first compiles and makes the moments
    return run


def step_times(device: torch.device, sizes: Sequence[StepSize], with_penalty: bool, num_rounds: int) -> StepTimes:
    """Time steps of the first size that fits."""
    size, step = first_that_fits(lambda size: _training_step(device, size, with_penalty), sizes)
    measured = [timed(step) for _ in range(num_rounds)]
    assert all(bool(loss.isfinite()) for _, loss in measured), "the loss is not finite"
    return StepTimes(size=size, with_penalty=with_penalty, seconds=[seconds for seconds, _ in measured])


def mfu_row(times: StepTimes, peak: float) -> Row:
    """Return the model FLOPs of a step by its time, as a share of ``peak``."""
    size, num_steps = times.size, len(times.seconds)
    share = ratio_of([size.flops(times.with_penalty) / peak] * num_steps, times.seconds)
    percent = Measurement(*(100 * value for value in (share.value, share.low, share.high)))
    what = f"GPU: training step of Ouro's shape, width {size.config.width}, bf16, {size.num_loops} loops, "
    what += f"{size.batch_size} × {size.length} tokens"
    what += "" if size.checkpoint_loops is None else f", checkpoint_loops {size.checkpoint_loops}"
    what += ", penalty on a sequence" if times.with_penalty else ""
    against = f"a large matrix product's {peak / 1e12:.3g} TFLOP/s"
    return Row(what, against, percent, 40.0 if times.with_penalty else 45.0, "at least", "%")


def run_row(device: torch.device, *arguments: str) -> Row:
    """Time a whole run of the paper's addition with STARS, in a process of its own, from start to exit.

    ``arguments`` are added to those of the command line.
    """
    files = (ROOT / "conf" / "paper" / "addition_stars.yaml", ROOT / "conf" / "overlays" / "bf16-mixed.yaml")
    command = [sys.executable, "-m", "looplm", "fit"]
    command += [argument for file in files for argument in ("--config", str(file))]
    command += [f"--trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}", "--trainer.devices=1"]
    with TemporaryDirectory() as folder:
        command += [f"--trainer.default_root_dir={folder}", *arguments]
        seconds, done = timed(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
        if done.returncode != 0 or not (Path(folder) / "checkpoints" / "last.ckpt").is_file():
            raise RuntimeError(f"the run ended with code {done.returncode}: {done.stderr[-2000:]}")
    what = "GPU: conf/paper/addition_stars.yaml, 10,000 steps, bf16-mixed"
    return Row(" ".join([what, *arguments]), "the clock", Measurement.exact(seconds / 60), 4.0, "at most", "min")


def generation_row(device: torch.device, size: GenerationSize, num_rounds: int) -> Row:
    """The time of a batch continued without a cache over that with one, in float32, so that tokens can be compared."""
    torch.manual_seed(0)
    with device:
        model = LoopedTransformer(size.config).eval()
        prompts = torch.randint(size.config.vocab_size, (size.num_rows, size.prompt_length))

    def run(cache: str, new_tokens: int = size.new_tokens) -> tuple[float, Tensor]:
        def write() -> Tensor:
            tokens = generate(
                model, prompts, num_loops=size.num_loops, max_new_tokens=new_tokens, end_id=-1, cache=cache
            )
            _finish(device)
            return tokens

        return timed(write)

    run("per_loop", 2), run("none", 2)  # warm up
    cached, uncached = [], []
    for _ in range(num_rounds):
        seconds, tokens = run("per_loop")
        cached.append(seconds)
        seconds, expected = run("none")
        uncached.append(seconds)
        # Sums in another order may turn a near tie, and what follows it.
        same = (tokens == expected).all(1).float().mean().item()
        assert same >= 0.75, f"only {same:.0%} of the rows are the same with a cache"
    what = f"GPU: generation of {size.num_rows} rows with a cache, {size.new_tokens} tokens, {size.num_loops} loops, "
    what += f"width {size.config.width}"
    return Row(what, "the same rows without", ratio_of(uncached, cached), 10.0, "at least", "x faster")


def gpu_rows(num_rounds: int) -> Iterator[Row]:
    """A row as soon as it is measured: some take minutes."""
    device = torch.device("cuda")
    peak = peak_flops(device)
    for with_penalty, sizes in ((False, _WITHOUT), (True, _WITH)):
        times = step_times(device, sizes, with_penalty, num_rounds)
        _free()
        yield mfu_row(times, peak)
    yield run_row(device)
    yield generation_row(device, _GENERATION, max(num_rounds // 8, 3))
