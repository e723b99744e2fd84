"""Fused merged linear and its dX: exact on whole numbers, no worse than eager on random ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmerge import use_backend
from fastmerge.deltas import Dense, Experts
from fastmerge.kernels import launching
from fastmerge.kernels import merged_linear as module
from fastmerge.ops import merged_linear

from ...tolerances import assert_no_worse_than_eager
from .data import DTYPES, SHAPES, merged, normal, weights, whole

LAMBDAS = (1.0, -1.0, 2.0)


def coefficients(count: int, device: torch.device) -> torch.Tensor:
    """Whole numbers, so that merged weights stay exact in bf16."""
    return torch.tensor([LAMBDAS[k % 3] for k in range(count)], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True], ids=["oi", "io"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape, transpose, dtype, device):
    rows, inner, outer = shape
    experts, count = not transpose, 3
    base, deltas = weights(whole, outer, inner, count, transpose, dtype, device)
    lam = coefficients(count, device)
    weight = merged(base, deltas, lam, experts, transpose)
    x = whole(rows, inner, seed=2, dtype=dtype, device=device)
    bias = whole(outer, seed=3, dtype=dtype, device=device)
    y = module.merged_linear_forward(x, base, deltas, lam, bias, experts, transpose)
    assert torch.equal(y, F.linear(x.double(), weight, bias.double()).to(dtype))
    dy = whole(rows, outer, seed=4, dtype=dtype, device=device)
    dx = module.merged_linear_backward_x(dy, base, deltas, lam, experts, transpose)
    assert torch.equal(dx, (dy.double() @ weight).to(dtype))


@pytest.mark.parametrize("inner", [70, 64], ids=["odd", "aligned"])
@pytest.mark.parametrize("count", [1, 2, 4, 9, 17, 32])
def test_counts(count, inner, device):
    base, deltas = weights(whole, 5, inner, count, False, torch.bfloat16, device)
    x = whole(3, inner, seed=2, dtype=torch.bfloat16, device=device)
    lam = coefficients(count, device)
    y = module.merged_linear_forward(x, base, deltas, lam, None, False, False)
    truth = x.double() @ merged(base, deltas, lam, False, False).t()
    assert torch.equal(y, truth.bfloat16())


@pytest.mark.parametrize("rows", [5, 20, 60, 140])
@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_configuration(dtype, capability, rows, device, monkeypatch):
    base, deltas = weights(whole, 130, 80, 2, False, dtype, device)
    lam = coefficients(2, device)
    x = whole(rows, 80, seed=2, dtype=dtype, device=device)
    truth = (x.double() @ merged(base, deltas, lam, True, False).t()).to(dtype)
    configs = module.configurations(rows, dtype, dtype, dtype, 2, True, capability, 232448)
    for config in configs:
        monkeypatch.setattr(launching, "choose", lambda *_, config=config: config)
        y = module.merged_linear_forward(x, base, deltas, lam, None, True, False)
        assert torch.equal(y, truth), config


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_groups_of_experts_keep_the_bytes(group, device, monkeypatch):
    """However many experts are read at once, they are added in order."""
    base, deltas = weights(normal, 20, 48, 9, False, torch.float32, device)
    x = normal(4, 48, seed=2, dtype=torch.float32, device=device)
    lam = normal(9, seed=5, dtype=torch.float32, device=device)
    whole_group = module.merged_linear_forward(x, base, deltas, lam, None, True, False)
    monkeypatch.setattr(module, "expert_group", lambda count, aligned: group)
    grouped = module.merged_linear_forward(x, base, deltas, lam, None, True, False)
    assert torch.equal(whole_group, grouped)


@pytest.mark.parametrize("bias", [False, True])
def test_split(bias, device):
    inner, dtype = 64 * module.MIN_STEPS * 3 + 5, torch.bfloat16
    base, deltas = weights(whole, 70, inner, 2, False, dtype, device)
    lam = coefficients(2, device)
    x = whole(3, inner, seed=2, dtype=dtype, device=device)
    b = whole(70, seed=3, dtype=dtype, device=device) if bias else None
    assert module.split_count(3, inner, 70, 64) == 3
    y = module.merged_linear_forward(x, base, deltas, lam, b, False, False)
    weight = merged(base, deltas, lam, False, False)
    assert torch.equal(y, F.linear(x.double(), weight, b if b is None else b.double()).to(dtype))


@pytest.mark.parametrize("experts", [True, False], ids=["experts", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager(dtype, experts, device):
    base, deltas = weights(normal, 67, 129, 3, False, dtype, device)
    lam = normal(3, seed=5, dtype=torch.float32, device=device)
    x = normal(33, 129, seed=2, dtype=dtype, device=device)
    bias = normal(67, seed=3, dtype=dtype, device=device)
    y = module.merged_linear_forward(x, base, deltas, lam, bias, experts, False)
    format = Experts(deltas) if experts else Dense(deltas)
    with use_backend("reference"):
        eager = merged_linear(x, base, format, lam, bias)
    weight = merged(base, deltas, lam, experts, False)
    truth = F.linear(x.double(), weight, bias.double())
    scale = F.linear(x.double().abs(), weight.abs(), bias.double().abs())
    assert_no_worse_than_eager(y, eager, truth, scale)


def test_mixed_dtypes(device):
    base, deltas = weights(whole, 20, 40, 2, False, torch.float32, device)
    deltas = [delta.half() for delta in deltas]
    lam = coefficients(2, device)
    x = whole(4, 40, seed=2, dtype=torch.bfloat16, device=device)
    bias = whole(20, seed=3, dtype=torch.float32, device=device)
    y = module.merged_linear_forward(x, base, deltas, lam, bias, True, False)
    truth = F.linear(x.double(), merged(base, deltas, lam, True, False), bias.double())
    assert y.dtype == torch.bfloat16 and torch.equal(y, truth.bfloat16())


def test_addresses_that_are_no_multiple_of_16(device):
    """Slices of larger buffers go another way than whole tensors, to the same exact values."""

    def shifted(*shape, seed, dtype, device):
        buffer = torch.empty(shape[0] * shape[1] + 1, dtype=dtype, device=device)[1:]
        return buffer.view(shape).copy_(whole(*shape, seed=seed, dtype=dtype, device=device))

    base, deltas = weights(shifted, 32, 64, 6, False, torch.bfloat16, device)
    lam = coefficients(6, device)
    x = whole(9, 64, seed=2, dtype=torch.bfloat16, device=device)
    assert not launching.is_aligned(base) and launching.is_aligned(x, base.clone())
    y = module.merged_linear_forward(x, base, deltas, lam, None, True, False)
    assert torch.equal(y, (x.double() @ merged(base, deltas, lam, True, False).t()).bfloat16())


def test_strides(device):
    def sliced(*shape, seed, dtype, device):
        rows, columns = shape
        larger = whole(rows + 1, 2 * columns + 1, seed=seed, dtype=dtype, device=device)
        return larger[1:, 1::2]

    base, deltas = weights(sliced, 21, 37, 3, False, torch.float16, device)
    deltas[1] = deltas[1].contiguous()
    lam = coefficients(6, device)[::2]
    x = whole(37, 9, seed=2, dtype=torch.float16, device=device).t()
    y = module.merged_linear_forward(x, base, deltas, lam, None, True, False)
    assert torch.equal(y, (x.double() @ merged(base, deltas, lam, True, False).t()).half())


def test_not_finite_stays_in_its_row(device):
    base, deltas = weights(whole, 20, 33, 2, False, torch.float32, device)
    deltas[1][7, 5] = float("nan")
    x = whole(4, 33, seed=2, dtype=torch.float32, device=device)
    y = module.merged_linear_forward(x, base, deltas, coefficients(2, device), None, False, False)
    assert torch.equal(torch.isnan(y).any(0).nonzero().flatten().cpu(), torch.tensor([7]))
