"""Coefficient gradient of a linear layer and the ordered sums of its second stage."""

from __future__ import annotations

import pytest
import torch

from fastmerge.kernels import coefficient_grad as module
from fastmerge.kernels.partial_sums import sum_partials

from ...tolerances import assert_no_worse_than_eager
from .data import DTYPES, SHAPES, normal, task_vectors, weights, whole


def truth(dy, x, base, deltas, experts, transpose):
    """<dY^T X, tau_k> in fp64, and the sum of the magnitudes that it adds up."""
    taus = task_vectors(base, deltas, experts, transpose)
    dots = torch.einsum("ro,ri,koi->k", dy.double(), x.double(), taus)
    return dots, torch.einsum("ro,ri,koi->k", dy.double().abs(), x.double().abs(), taus.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True], ids=["oi", "io"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape, transpose, dtype, device):
    rows, inner, outer = shape
    experts = transpose
    base, deltas = weights(whole, outer, inner, 3, transpose, dtype, device)
    x = whole(rows, inner, seed=2, dtype=dtype, device=device)
    dy = whole(rows, outer, seed=3, dtype=dtype, device=device)
    found = module.linear_coefficient_grad(dy, x, base if experts else None, deltas, transpose)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), truth(dy, x, base, deltas, experts, transpose)[0])


@pytest.mark.parametrize("count", [1, 8, 32])
def test_counts(count, device):
    base, deltas = weights(whole, 70, 5, count, False, torch.bfloat16, device)
    x = whole(9, 5, seed=2, dtype=torch.bfloat16, device=device)
    dy = whole(9, 70, seed=3, dtype=torch.bfloat16, device=device)
    found = module.linear_coefficient_grad(dy, x, base, deltas, False)
    assert torch.equal(found.double(), truth(dy, x, base, deltas, True, False)[0])


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str)
@pytest.mark.parametrize("experts", [True, False], ids=["experts", "dense"])
def test_large_tile_and_shares(experts, dtypes, device):
    dtype, delta_dtype = (getattr(torch, name) for name in dtypes)
    base, deltas = weights(whole, 130, 140, 2, False, delta_dtype, device)
    rows = module.MIN_SHARE + 70
    x = whole(rows, 140, seed=2, dtype=dtype, device=device, size=1)
    dy = whole(rows, 130, seed=3, dtype=dtype, device=device, size=1)
    found = module.linear_coefficient_grad(dy, x, base if experts else None, deltas, False)
    assert torch.equal(found.double(), truth(dy, x, base, deltas, experts, False)[0])


@pytest.mark.parametrize("experts", [True, False], ids=["experts", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager(dtype, experts, device):
    base, deltas = weights(normal, 67, 129, 3, False, dtype, device)
    x = normal(50, 129, seed=2, dtype=dtype, device=device)
    dy = normal(50, 67, seed=3, dtype=dtype, device=device)
    found = module.linear_coefficient_grad(dy, x, base if experts else None, deltas, False)
    grad_weight = (dy.t() @ x).float()
    taus = [delta.float() - (base.float() if experts else 0) for delta in deltas]
    eager = torch.stack([(grad_weight * tau).sum() for tau in taus])
    assert_no_worse_than_eager(found, eager, *truth(dy, x, base, deltas, experts, False))


def test_strides(device):
    base, deltas = weights(whole, 30, 20, 2, False, torch.float16, device)
    deltas = [delta.t().contiguous().t() for delta in deltas]
    x = whole(20, 11, seed=2, dtype=torch.float16, device=device).t()
    dy = whole(11, 60, seed=3, dtype=torch.float16, device=device)[:, ::2]
    found = module.linear_coefficient_grad(dy, x, base, deltas, False)
    assert torch.equal(found.double(), truth(dy, x, base, deltas, True, False)[0])


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (7, 40), (300, 8), (129, 5), (4, 0)], ids=str)
def test_sum_partials(shape, device):
    partials = whole(*shape, seed=1, dtype=torch.float32, device=device)
    assert torch.equal(sum_partials(partials), partials.sum(0))


def test_sum_partials_with_bias(device):
    partials = whole(3, 5, 4, seed=1, dtype=torch.float32, device=device)
    bias = whole(4, seed=2, dtype=torch.bfloat16, device=device)
    found = sum_partials(partials, torch.bfloat16, bias)
    assert torch.equal(found, (partials.sum(0) + bias).bfloat16())
