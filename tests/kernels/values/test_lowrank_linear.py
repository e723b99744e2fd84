"""Linear layer with row coefficients of low-rank deltas; its gradients through the op."""

from __future__ import annotations

import pytest
import torch

from fastmerge import use_backend
from fastmerge.kernels import lowrank_linear as module
from fastmerge.ops import lowrank_linear

from ...tolerances import assert_no_worse_than_eager
from .data import DTYPES, SHAPES, normal, whole

RANKS = (3, 0, 70)


def inputs(make, rows, inner, outer, dtype, device, ranks=RANKS):
    total = sum(ranks)
    shapes = ((rows, inner), (outer, inner), (total, inner), (outer, total), (outer,))
    return [make(*shape, seed=k, dtype=dtype, device=device) for k, shape in enumerate(shapes, 1)]


def coefficients(rows, count, device):
    """One expert a row, none and several: whole numbers, many of them 0."""
    lam = whole(rows, count, seed=9, dtype=torch.float32, device=device)
    return lam * (whole(rows, count, seed=10, dtype=torch.float32, device=device) > 0)


def exact(x, base, down, up, lam, bias, ranks=RANKS):
    scale = lam.double().repeat_interleave(torch.tensor(ranks, device=lam.device), 1)
    thin = (x.double() @ down.double().t()) * scale
    y = x.double() @ base.double().t() + thin @ up.double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape, dtype, device):
    """Small whole numbers: the thin product is exact in bf16 where the inner dimension is short."""
    rows, inner, outer = shape
    x, base, down, up, bias = inputs(whole, rows, inner, outer, dtype, device)
    down = down * (torch.arange(inner, device=device) % 7 == 0).to(dtype)
    x, up = x.clamp(-1, 1), up.clamp(-1, 1)
    lam = coefficients(rows, 3, device)
    y = module.lowrank_linear_forward(x, base, down, up, RANKS, lam, bias)
    assert torch.equal(y, exact(x, base, down, up, lam, bias).to(dtype))
    y = module.lowrank_linear_forward(x, base, down, up, RANKS, torch.zeros_like(lam), None)
    assert torch.equal(y, (x.double() @ base.double().t()).to(dtype))


def test_an_unused_expert_is_not_multiplied_with(device):
    x, base, down, up, bias = inputs(whole, 70, 20, 30, torch.float32, device)
    lam = torch.zeros(70, 3, device=device)
    lam[:35, 0] = lam[35:, 2] = 1
    down[3:] = float("nan")
    y = module.lowrank_linear_forward(x, base, down, up, RANKS, lam, bias)
    assert y.isnan().any(1).tolist() == [False] * 35 + [True] * 35


def test_many_rows_and_other_strides(device):
    x, base, down, up, bias = inputs(whole, 520, 20, 140, torch.bfloat16, device)
    x, lam = x.clamp(-1, 1), coefficients(520, 3, device)
    down = down * (torch.arange(20, device=device) % 7 == 0).to(down.dtype)
    base, down, up = base.t().contiguous().t(), down.t().contiguous().t(), up.t().contiguous().t()
    expected = exact(x, base, down, up.clamp(-1, 1), lam, bias).bfloat16()
    strided = torch.stack([x, x], 2)[..., 0]
    y = module.lowrank_linear_forward(strided, base, down, up.clamp(-1, 1), RANKS, lam, bias)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("transpose", [False, True], ids=["oi", "io"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager(dtype, transpose, device):
    """Through the op, with coefficients of samples [B, 1, K]."""
    x, base, down, up, bias = inputs(normal, 32, 65, 40, dtype, device)
    if transpose:
        base, down, up = base.t(), up.t(), down.t()
    x, lam = x.view(4, 8, 65), normal(4, 1, 3, seed=9, dtype=torch.float32, device=device)
    lam[0], lam[1, 0, 2] = 0, 0
    grad = normal(4, 8, 40, seed=11, dtype=dtype, device=device)

    def run(backend, convert=None):
        leaves = [t.detach().to(convert or t.dtype).requires_grad_() for t in (x, lam, bias)]
        weights = [t.to(convert or t.dtype) for t in (base, down, up)]
        with use_backend(backend):
            y = lowrank_linear(leaves[0], *weights, RANKS, *leaves[1:], transpose=transpose)
            y.backward(grad.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    found, eager, truth = run("triton"), run("reference"), run("reference", torch.float64)
    absolute = [t.abs() for t in (x, base, down, up, lam, bias)]
    sizes = [t.double() for t in absolute]
    leaves = [t.requires_grad_() for t in (sizes[0], sizes[4], sizes[5])]
    with use_backend("reference"):
        size = lowrank_linear(leaves[0], *sizes[1:4], RANKS, *leaves[1:], transpose=transpose)
        size.backward(grad.double().abs())
    scales = [size.detach(), *(leaf.grad for leaf in leaves)]
    for a, b, c, scale in zip(found, eager, truth, scales, strict=True):
        assert_no_worse_than_eager(a, b, c, scale, dtype)
