"""The formulas against torch's own counter, which watches the matrix products of a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from looplm.config import LoopedConfig
from looplm.depth import FixedDepth
from looplm.flops import forward_flops, penalty_flops, training_flops
from looplm.model import LoopedTransformer
from looplm.objective import STARSObjective
from looplm.randomness import StepKey
from looplm.stability.penalty import JacobianPenalty, LastStepPenalty, Penalty

SIZE: dict[str, Any] = {"vocab_size": 11, "max_positions": 8, "width": 16, "num_heads": 4, "ffn_width": 24}
KEY = StepKey(seed=0, micro_batch=0, optimizer_step=0, rank=0)
BATCH, LENGTH, UNLABELLED = 6, 5, 2
NUM_LABELS = BATCH * (LENGTH - UNLABELLED)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "paper": {},
    "post_norm": {"norm_placement": "post_norm"},
    "simple_norm": {"norm_type": "simple_norm"},
    "swiglu": {"activation": "swiglu", "num_core_layers": 3, "norm_type": "rms_norm", "tie_embeddings": False},
    "stages": {"num_prelude_layers": 2, "num_coda_layers": 1},
    "grouped": {"num_kv_heads": 2, "attention_head_width": 6, "positions": "rotary"},
    "linear": {"input_injection": "linear", "num_prelude_layers": 1, "state_init": "normal"},
    "diagonal": {"input_injection": "diagonal", "norm_placement": "post_norm"},
    "add": {"input_injection": "add", "norm_type": "simple_norm", "num_prelude_layers": 1},
}


def _config(name: str) -> LoopedConfig:
    return LoopedConfig(**SIZE, **ARCHITECTURES[name])


def _counted(run: Any) -> int:
    # The fused kernel of a CPU is not in the counter's table; its mathematical form is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class _ProductCounter(TorchDispatchMode):
    """The counter's formulas without its tracking of modules, which refuses ``torch.autograd.grad``."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _step(config: LoopedConfig, num_loops: int, **objective: Any) -> int:
    model = LoopedTransformer(config)
    tokens = torch.randint(11, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    run = STARSObjective(depth_sampler=FixedDepth(num_loops), **objective)
    labels = tokens.clone()
    labels[:, :UNLABELLED] = -100
    batch = {"input_ids": tokens, "labels": labels}
    if "penalty" not in objective:
        return _counted(lambda: run(model, batch, KEY).loss.backward())
    with sdpa_kernel(SDPBackend.MATH), _ProductCounter() as counter:
        run(model, batch, KEY).loss.backward()
    return counter.total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_forward_pass_is_counted_exactly(name: str) -> None:
    config = _config(name)
    model = LoopedTransformer(config)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for num_loops in (0, 1, 5):
        with torch.no_grad():
            counted = _counted(lambda num_loops=num_loops: model(tokens, num_loops))
        assert forward_flops(config, BATCH, LENGTH, num_loops) == counted


@pytest.mark.parametrize("spare_unlabelled", [False, True])
@pytest.mark.parametrize("backprop_loops", [None, 1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_training_step_is_counted_exactly_at_every_depth(
    name: str, backprop_loops: int | None, spare_unlabelled: bool
) -> None:
    config = _config(name)
    num_queries = NUM_LABELS if spare_unlabelled and not config.num_coda_layers else None  # a row has as many labels
    for num_loops in (1, 2, 7):
        counted = _step(config, num_loops, backprop_loops=backprop_loops, spare_unlabelled=spare_unlabelled)
        assert training_flops(config, BATCH, LENGTH, num_loops, backprop_loops, NUM_LABELS, num_queries) == counted


@pytest.mark.parametrize(
    "penalty",
    [
        JacobianPenalty(method="finite_difference"),
        JacobianPenalty(method="finite_difference", fraction=0.25),
        JacobianPenalty("spectral_radius", "finite_difference", num_iterations=3),
        JacobianPenalty("spectral_norm", "finite_difference", num_iterations=2, fraction=0.5),
        LastStepPenalty(),
    ],
)
@pytest.mark.parametrize("name", ["paper", "post_norm", "swiglu", "linear", "grouped"])
def test_the_products_of_a_penalty_are_counted_exactly(name: str, penalty: Penalty) -> None:
    config = _config(name)
    counted = _step(config, 3, penalty=penalty, penalty_weight=0.1)
    step = training_flops(config, BATCH, LENGTH, 3, num_logits=NUM_LABELS)
    assert step + penalty_flops(config, BATCH, LENGTH, penalty) == counted
    if penalty.fraction <= 0.5:
        counted = _step(config, 3, penalty=penalty, penalty_weight=0.1, spare_unlabelled=True)
        step = training_flops(config, BATCH, LENGTH, 3, num_logits=NUM_LABELS, num_queries=NUM_LABELS)
        assert step + penalty_flops(config, BATCH, LENGTH, penalty, state_is_spared=True) == counted
