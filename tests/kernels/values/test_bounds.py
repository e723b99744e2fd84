"""No kernel reads past the end of an input: there, memory that must not be touched begins."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch

from fastmerge import kernels
from fastmerge.kernels import launching
from fastmerge.ops._bits import pack_rows

from .data import normal, whole

pytestmark = pytest.mark.skipif(
    not launching.INTERPRETED or sys.platform != "linux",
    reason="needs the interpreter, which reads this process's memory, and mprotect",
)
SIZES = [(3, 7, 5), (17, 65, 130)]  # R, I, O
PAGE = mmap.PAGESIZE
PROT_NONE = 0


def at_the_edge(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last one before a protected page."""
    flat = tensor.contiguous().flatten()
    size = -(-flat.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(PAGE), PROT_NONE) == 0
    copy = torch.frombuffer(memory, dtype=flat.dtype, offset=size - flat.nbytes)[: flat.numel()]
    return copy.copy_(flat).view(tensor.shape)


@pytest.mark.parametrize("transpose", [False, True], ids=["oi", "io"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_kernels(sizes, transpose, device):
    rows, inner, outer = sizes

    def make(*shape, seed):
        return at_the_edge(whole(*shape, seed=seed, dtype=torch.bfloat16, device=device))

    shape = (inner, outer) if transpose else (outer, inner)
    base, *deltas = (make(*shape, seed=k) for k in range(3))
    x, dy, bias = make(rows, inner, seed=3), make(rows, outer, seed=4), make(outer, seed=5)
    lam = at_the_edge(normal(2, seed=6, dtype=torch.float32, device=device))
    rows_lam = at_the_edge(normal(rows, 2, seed=7, dtype=torch.float32, device=device))
    results = [
        kernels.merged_linear_forward(x, base, deltas, lam, bias, True, transpose),
        kernels.merged_linear_backward_x(dy, base, deltas, lam, True, transpose),
        kernels.linear_coefficient_grad(dy, x, base, deltas, transpose),
        kernels.row_linear_forward(x, base, deltas, rows_lam, bias, True, transpose),
        *kernels.row_linear_backward(dy, x, base, deltas, rows_lam, True, transpose),
    ]
    assert all(torch.isfinite(result).all() for result in results)


def test_low_rank_kernel(device):
    def make(*shape, seed):
        return at_the_edge(whole(*shape, seed=seed, dtype=torch.bfloat16, device=device))

    for rows, inner, outer in SIZES:
        x, base, bias = make(rows, inner, seed=1), make(outer, inner, seed=2), make(outer, seed=3)
        down, up = make(5, inner, seed=4), make(outer, 5, seed=5)
        lam = at_the_edge(normal(rows, 2, seed=7, dtype=torch.float32, device=device))
        y = kernels.lowrank_linear_forward(x, base, down, up, [2, 3], lam, bias)
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("transpose", [False, True], ids=["oi", "io"])
def test_masked_kernels(transpose, device):
    def make(*shape, seed):
        return at_the_edge(whole(*shape, seed=seed, dtype=torch.bfloat16, device=device))

    for rows, inner, outer in SIZES:
        shape = (inner, outer) if transpose else (outer, inner)
        x, dy, bias = make(rows, inner, seed=1), make(rows, outer, seed=2), make(outer, seed=3)
        base, unified = make(*shape, seed=4), make(*shape, seed=5)
        masks = at_the_edge(pack_rows(torch.rand(2, *shape, device=device) < 0.5))
        lam = at_the_edge(torch.eye(2, device=device).repeat(rows, 1)[:rows])
        results = [
            kernels.masked_linear_forward(x, base, unified, masks, lam, bias, transpose),
            *kernels.masked_linear_backward(dy, x, base, unified, masks, lam, transpose),
            kernels.linear_masked_coefficient_grad(dy, x, unified, masks, transpose),
        ]
        assert all(torch.isfinite(result).all() for result in results)


def test_adapter_kernel(device):
    def make(*shape, seed):
        return at_the_edge(whole(*shape, seed=seed, dtype=torch.bfloat16, device=device))

    for rows, width, rank in [(3, 7, 5), (17, 65, 30)]:
        x, down, up = (
            make(*shape, seed=k)
            for k, shape in enumerate([(2, rows, width), (3, rank, width), (3, width, rank)])
        )
        tasks = at_the_edge(torch.tensor([2, 1], device=device))
        assert torch.isfinite(kernels.residual_adapter_forward(x, down, up, tasks)).all()


@pytest.mark.parametrize("shape", [(1, 3), (5, 1300)], ids=str)
def test_softmax_entropy(shape, device):
    logits = at_the_edge(normal(*shape, seed=1, dtype=torch.float16, device=device))
    grad = at_the_edge(normal(shape[0], seed=2, dtype=torch.float32, device=device))
    entropy, normalizer = kernels.softmax_entropy_forward(logits)
    slope = kernels.softmax_entropy_backward(
        grad, logits, at_the_edge(entropy), at_the_edge(normalizer)
    )
    assert torch.isfinite(entropy).all() and torch.isfinite(slope).all()


def test_partial_sums(device):
    from fastmerge.kernels.partial_sums import sum_partials

    partials = at_the_edge(whole(5, 7, seed=1, dtype=torch.float32, device=device))
    assert torch.equal(sum_partials(partials), partials.sum(0))
