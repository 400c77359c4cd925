"""MuonAdamW: PyTorch's two rules under one learning rate, schedule and checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from looplm import LoopedConfig, LoopedTransformer, MuonAdamW
from looplm.optimizers import share_of_lost_updates


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)).double()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_each_parameter_moves_as_under_its_own_rule_of_pytorch() -> None:
    model = _net()
    twin = copy.deepcopy(model)
    optimizer = MuonAdamW(model.named_parameters(), lr=0.01, weight_decay=0.1)
    matrices = [p for p in twin.parameters() if p.ndim == 2]
    rest = [p for p in twin.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for seed in range(4):
        _step(model, optimizer, seed)
        muon.zero_grad()
        _step(twin, adamw, seed)
        muon.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        # PyTorch's Muon computes its update in bfloat16, ours does not.
        atol = 3e-4 if ours.ndim == 2 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_changes_singular_values_by_its_quintic_and_nothing_else(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = nn.Linear(shape[1], shape[0], bias=False).double()
    before = layer.weight.detach().clone()
    layer.weight.grad = gradient
    optimizer = MuonAdamW(layer.named_parameters(), lr=0.1, weight_decay=0.0)
    optimizer.step()
    u, values, v = torch.linalg.svd(gradient, full_matrices=False)
    values = values / values.norm()
    a, b, c = optimizer.param_groups[0]["ns_coefficients"]
    for _ in range(optimizer.param_groups[0]["ns_steps"]):
        values = a * values + b * values**3 + c * values**5
    expected = before - 0.1 * 0.2 * max(shape) ** 0.5 * (u * values) @ v
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-12)


def test_queries_keys_and_values_in_one_matrix_move_as_three_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(18, 6, generator=generator, dtype=torch.float64) for _ in range(2))

    def moved(**parts: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return parameters after a step, each from some rows of the weight and their gradient."""
        params = {name: nn.Parameter(weight[slice(*rows)].clone()) for name, rows in parts.items()}
        for name, param in params.items():
            param.grad = gradient[slice(*parts[name])].clone()
        MuonAdamW(params.items(), lr=0.1).step()
        return {name: param.detach() for name, param in params.items()}

    fused = moved(qkv=(0, 18), up=(0, 18))
    apart = torch.cat(list(moved(q=(0, 6), k=(6, 12), v=(12, 18)).values()))
    torch.testing.assert_close(fused["qkv"], apart, rtol=0, atol=1e-12)
    assert (fused["up"] - apart).abs().max() > 1e-3  # another tall matrix is one
    grouped = torch.cat(list(moved(q=(0, 6), kv=(6, 9)).values()))  # fewer heads for keys and values
    torch.testing.assert_close(moved(qkv=(0, 9))["qkv"], grouped, rtol=0, atol=1e-12)


def test_a_schedule_reaches_both_rules() -> None:
    model = _net()
    optimizer = MuonAdamW(model.named_parameters(), lr=0.01, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    _step(model, optimizer, 0)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_saved_state_goes_on_to_the_same_weights() -> None:
    model = _net()
    optimizer = MuonAdamW(model.named_parameters())
    for seed in range(3):
        _step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    other = MuonAdamW(twin.named_parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        _step(model, optimizer, seed)
        _step(twin, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert set(other.state) == set(twin.parameters())


def test_tables_heads_norms_and_biases_are_left_to_adamw() -> None:
    config = LoopedConfig(vocab_size=11, max_positions=8, width=8, num_heads=2, ffn_width=8, tie_embeddings=False)
    optimizer = MuonAdamW(LoopedTransformer(config).named_parameters())
    muon, adamw = (set(group["param_names"]) for group in optimizer.param_groups)
    parts = ("attention.qkv", "attention.out", "ffn.up", "ffn.down")
    assert muon == {f"core.0.{part}.weight" for part in parts}
    assert {"token_embedding.weight", "position_embedding.weight", "head.weight", "final_norm.weight"} <= adamw


def test_parameters_without_names_or_without_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="named_parameters"):
        MuonAdamW(_net().parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="AdamW alone would do"):
        MuonAdamW(nn.LayerNorm(4).named_parameters())


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4, 1e-3])
def test_lost_updates_are_those_that_leave_a_weight_as_it_was(lr: float) -> None:
    drawn = 0.02 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    weights = nn.Parameter(torch.cat([drawn, torch.zeros(10)]).bfloat16())
    optimizer = torch.optim.AdamW([weights], lr=lr, weight_decay=0.0)
    expected = share_of_lost_updates(optimizer)
    before = weights.detach().clone()
    weights.grad = torch.where(before < 0, -1.0, 1.0).bfloat16().neg()  # away from zero, where spacing is not halved
    optimizer.step()
    assert (weights == before).float().mean().item() == pytest.approx(expected, abs=0.01)
    assert share_of_lost_updates(torch.optim.AdamW([nn.Parameter(drawn)], lr=lr)) == 0
