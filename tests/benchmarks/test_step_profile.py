"""The profile's table: every operation is of one kind, and the shares are of the whole."""

from __future__ import annotations

import pytest
import torch

from .step_profile import _milliseconds, kind_of, step_profile


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention kernels"),
        ("aten::_softmax", "attention kernels"),
        ("aten::native_layer_norm_backward", "norm kernels"),
        ("aten::gelu_backward", "GELU kernels"),
        ("aten::add_", "sums and other arithmetic"),
        ("aten::copy_", "copies"),
        ("Optimizer.step#AdamW.step", "optimiser"),
        ("aten::view", "the rest"),
    ],
)
def test_an_operation_has_its_kind(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


@pytest.mark.parametrize("fused", [False, True])
def test_what_an_optimiser_calls_is_its_own(fused: bool) -> None:
    weights = torch.nn.Parameter(torch.ones(1000, 1000))
    weights.grad = torch.ones_like(weights)
    spent = _milliseconds(torch.optim.AdamW([weights], fused=fused).step, 3)
    assert spent["optimiser"] > 0.9 * spent.total()


def test_the_table_has_both_steps_and_shares_of_the_whole() -> None:
    head, rule, *rows, last = step_profile(32, 1).splitlines()
    assert head.startswith("| width 32 | the authors' procedure (ms)")
    assert rule == "|---|---|---|---|---|"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {name for name, *_ in cells} >= {"matrix products", "attention kernels", "the rest"}
    for milliseconds, share in ((1, 2), (3, 4)):
        assert sum(int(row[share]) for row in cells) == pytest.approx(100, abs=len(cells) / 2)
        total = float(last.strip("|").split("|")[milliseconds])
        assert sum(float(row[milliseconds]) for row in cells) == pytest.approx(total, abs=0.5)
