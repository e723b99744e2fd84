"""Linear layer with row coefficients and both of its gradients."""

from __future__ import annotations

import pytest
import torch

from fastmerge import use_backend
from fastmerge.deltas import Dense, Experts
from fastmerge.kernels import row_linear as module
from fastmerge.ops import merged_linear

from ...tolerances import assert_no_worse_than_eager
from .data import DTYPES, SHAPES, merged, normal, task_vectors, weights, whole


def row_products(x, weight, bias=None):
    y = torch.einsum("ri,roi->ro", x.double(), weight)
    return y if bias is None else y + bias.double()


def check_exact(rows, inner, outer, count, experts, transpose, dtype, device):
    base, deltas = weights(whole, outer, inner, count, transpose, dtype, device)
    x = whole(rows, inner, seed=2, dtype=dtype, device=device)
    lam = whole(rows, count, seed=5, dtype=torch.float32, device=device)
    bias = whole(outer, seed=3, dtype=dtype, device=device)
    weight = merged(base, deltas, lam, experts, transpose)
    y = module.row_linear_forward(x, base, deltas, lam, bias, experts, transpose)
    assert torch.equal(y, row_products(x, weight, bias).to(dtype))
    dy = whole(rows, outer, seed=4, dtype=dtype, device=device)
    dx, grad = module.row_linear_backward(dy, x, base, deltas, lam, experts, transpose)
    assert torch.equal(dx, row_products(dy, weight.transpose(1, 2)).to(dtype))
    taus = task_vectors(base, deltas, experts, transpose)
    dots = torch.einsum("ro,koi,ri->rk", dy.double(), taus, x.double())
    assert grad.dtype == torch.float32 and torch.equal(grad.double(), dots)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True], ids=["oi", "io"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape, transpose, dtype, device):
    check_exact(*shape, 3, not transpose, transpose, dtype, device)


@pytest.mark.parametrize("count", [1, 9, 32])
def test_counts(count, device):
    check_exact(3, 7, 70, count, True, False, torch.bfloat16, device)


def test_large_tile(device):
    check_exact(520, 20, 140, 2, True, False, torch.bfloat16, device)


@pytest.mark.parametrize("experts", [True, False], ids=["experts", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager(dtype, experts, device):
    base, deltas = weights(normal, 67, 129, 3, False, dtype, device)
    if experts:  # fine-tuned weights stay close to the base model's
        deltas = [(base.double() + 0.1 * delta.double()).to(dtype) for delta in deltas]
    lam = normal(33, 3, seed=5, dtype=torch.float32, device=device)
    x = normal(33, 129, seed=2, dtype=dtype, device=device)
    dy = normal(33, 67, seed=4, dtype=dtype, device=device)
    y = module.row_linear_forward(x, base, deltas, lam, None, experts, False)
    dx, grad = module.row_linear_backward(dy, x, base, deltas, lam, experts, False)
    leaves = x.clone().requires_grad_(), lam.clone().requires_grad_()
    format = Experts(deltas) if experts else Dense(deltas)
    with use_backend("reference"):
        eager = merged_linear(leaves[0], base, format, leaves[1])
        eager.backward(dy)
    taus = task_vectors(base, deltas, experts, False)
    # The walk adds base and K products, so the size of what is added is that of all K + 1.
    sizes = merged(base.abs(), list(taus.abs()), lam.abs(), False, False)
    weight = merged(base, deltas, lam, experts, False)
    scale = row_products(x.abs(), sizes)
    assert_no_worse_than_eager(y, eager.detach(), row_products(x, weight), scale)
    scale = row_products(dy.abs(), sizes.transpose(1, 2))
    truth = row_products(dy, weight.transpose(1, 2))
    assert_no_worse_than_eager(dx, leaves[0].grad, truth, scale)
    dots, sizes = (
        torch.einsum("ro,koi,ri->rk", *factors)
        for factors in (
            (dy.double(), taus, x.double()),
            (dy.double().abs(), taus.abs(), x.double().abs()),
        )
    )
    # tau is rounded to the inputs' dtype before the product.
    assert_no_worse_than_eager(grad, leaves[1].grad, dots, sizes, dtype)


def test_strides(device):
    base, deltas = weights(whole, 30, 20, 2, False, torch.float16, device)
    x = whole(20, 11, seed=2, dtype=torch.float16, device=device).t()
    dy = whole(11, 60, seed=3, dtype=torch.float16, device=device)[:, ::2]
    lam = whole(2, 11, seed=5, dtype=torch.float16, device=device).t()
    weight = merged(base, deltas, lam, True, False)
    y = module.row_linear_forward(x, base, deltas, lam, None, True, False)
    assert torch.equal(y, row_products(x, weight).half())
    dx, grad = module.row_linear_backward(dy, x, base, deltas, lam, True, False)
    assert torch.equal(dx, row_products(dy, weight.transpose(1, 2)).half())
    taus = task_vectors(base, deltas, True, False)
    dots = torch.einsum("ro,koi,ri->rk", dy.double(), taus, x.double())
    assert torch.equal(grad.double(), dots)


@pytest.mark.parametrize("own", [(4, 1), (1, 3), (1, 1), (4, 3)], ids=str)
def test_coefficients_broadcast_to_the_rows(own, device):
    base, deltas = weights(normal, 30, 20, 3, False, torch.float32, device)
    options = {"dtype": torch.float32, "device": device}
    leaves = normal(4, 3, 20, seed=2, **options), normal(*own, 3, seed=5, **options)
    dy = normal(4, 3, 30, seed=4, **options)
    results = []
    for backend in ("triton", "reference"):
        x, lam = (leaf.clone().requires_grad_() for leaf in leaves)
        with use_backend(backend):
            y = merged_linear(x, base, Experts(deltas), lam)
            y.backward(dy)
        results.append((y.detach(), x.grad, lam.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
