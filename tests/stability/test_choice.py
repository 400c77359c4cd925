"""Which product a strategy and a precision allow, as LoopLM meets them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ParallelStrategy

from looplm import JacobianPenalty, LastStepPenalty, ShardedStrategy, StarsReleasePenalty
from looplm.errors import InputError
from looplm.parallel import choose_product
from looplm.stability.choice import Parallelism, possible_products


@pytest.fixture
def narrowed_to_tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def _run(strategy: Any = None, precision: str = "32-true") -> Any:
    """What the choice reads of a trainer: a strategy that needs a GPU or a second process cannot be set up here."""
    strategy = L.Trainer(accelerator="cpu", logger=False).strategy if strategy is None else strategy
    if isinstance(strategy, ParallelStrategy):
        strategy.parallel_devices = [torch.device("cpu")]
    return SimpleNamespace(strategy=strategy, precision=precision)


def test_every_strategy_has_products_and_narrow_weights_have_no_finite_difference() -> None:
    for parallelism in get_args(Parallelism):
        wide = possible_products(parallelism, narrow_weights=False)
        assert wide[0] == "finite_difference"
        assert possible_products(parallelism, narrow_weights=True) == wide[1:]
    assert possible_products("deepspeed_stage_3", narrow_weights=True) == ()


@pytest.mark.parametrize(
    ("strategy", "precision", "expected"),
    [
        (None, "32-true", "finite_difference"),
        (None, "bf16-mixed", "finite_difference"),
        (None, "bf16-true", "jvp"),
        (DDPStrategy(), "16-mixed", "finite_difference"),
        (ShardedStrategy(), "bf16-true", "jvp"),
        (FSDPStrategy(), "32-true", "finite_difference"),
        (FSDPStrategy(), "bf16-true", "vjp"),
    ],
)
def test_auto_becomes_the_best_that_works_and_is_said(
    strategy: Any, precision: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    penalty = JacobianPenalty(target=0.5)
    chosen = choose_product(penalty, _run(strategy, precision))
    assert isinstance(chosen, JacobianPenalty)
    assert (chosen.method, chosen.target, penalty.method) == (expected, 0.5, "auto")
    assert f"penalty: product {expected}, chosen for" in caplog.text
    assert precision in caplog.text


def _deepspeed(stage: int) -> Any:
    """Lightning builds one only where the package is installed."""
    strategy = object.__new__(DeepSpeedStrategy)
    vars(strategy).update(config={"zero_optimization": {"stage": stage}}, cluster_environment=None)
    return strategy


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [(2, "32-true", "finite_difference"), (3, "32-true", "finite_difference"), (2, "bf16-mixed", "jvp")],
)
def test_deepspeed_narrows_the_weights_whatever_the_precision_is_called(
    stage: int, precision: str, expected: str
) -> None:
    assert choose_product(JacobianPenalty(), _run(_deepspeed(stage), precision)).method == expected


def test_deepspeed_that_gathers_narrow_weights_has_no_product() -> None:
    with pytest.raises(InputError, match="works with no product under deepspeed_stage_3 at precision bf16-mixed"):
        choose_product(JacobianPenalty(), _run(_deepspeed(3), "bf16-mixed"))


@pytest.mark.usefixtures("narrowed_to_tf32")
def test_narrowed_products_cost_finite_differences_their_digits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert choose_product(JacobianPenalty(), _run(DDPStrategy())).method == "jvp"
    assert choose_product(JacobianPenalty(), _run(FSDPStrategy())).method == "vjp"
    assert "products narrowed to tf32" in caplog.text
    forced = JacobianPenalty(method="finite_difference")
    with pytest.warns(UserWarning, match="finite differences lose digits: float32 products are narrowed to tf32"):
        assert choose_product(forced, _run()) is forced


@pytest.mark.usefixtures("narrowed_to_tf32")
def test_auto_outside_of_a_run_follows_the_products() -> None:
    hidden = torch.ones(2, 3)
    with pytest.raises(NotImplementedError, match="`jvp` cannot go through"):
        JacobianPenalty()(_NoForwardMode.apply, hidden, hidden, None, torch.Generator())


class _NoForwardMode(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def test_forced_product_that_works_stays() -> None:
    penalty = JacobianPenalty(method="jvp")
    assert choose_product(penalty, _run()) is penalty
    assert choose_product(LastStepPenalty(), _run(precision="bf16-true")).method is None


@pytest.mark.parametrize(
    ("penalty", "strategy", "precision", "message"),
    [
        (
            JacobianPenalty(method="finite_difference"),
            None,
            "bf16-true",
            r"\('auto', 'jvp', 'vjp'\) under single",
        ),
        (
            JacobianPenalty(method="jvp"),
            FSDPStrategy(),
            "32-true",
            r"under fsdp1 at .* got 'jvp'",
        ),
    ],
)
def test_forced_product_that_fails_is_one_clear_line(penalty: Any, strategy: Any, precision: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_product(penalty, _run(strategy, precision))


def test_authors_release_needs_double_backward() -> None:
    assert choose_product(StarsReleasePenalty(), _run()).method == "vjp"


def test_auto_outside_of_a_run_follows_the_state() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        # It refuses a state of another type, which finite differences would bring.
        step = partial(torch.matmul, other=torch.full((4, 4), 0.1, dtype=dtype))
        hidden = torch.ones(2, 3, 4, dtype=dtype)
        value = JacobianPenalty()(step, hidden, hidden, None, torch.Generator().manual_seed(0))
        assert value.isfinite()


def test_spectral_norm_by_vjp_is_refused() -> None:
    with pytest.raises(ValueError, match="`quantity: spectral_norm` needs `J v`"):
        JacobianPenalty(quantity="spectral_norm", method="vjp")
