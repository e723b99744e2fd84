"""Low-rank adapters of each sample's task."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastmerge import use_backend
from fastmerge.kernels import residual_adapter as module
from fastmerge.ops import residual_adapter

from ...tolerances import assert_no_worse_than_eager
from .data import DTYPES, normal, whole

# Samples, rows of each, width, rank.
SHAPES = [(1, 1, 1, 1), (3, 7, 5, 2), (4, 17, 65, 16), (2, 70, 130, 20), (2, 0, 3, 1), (0, 4, 3, 1)]
COUNT = 3


def inputs(make, shape, dtype, device):
    samples, rows, width, rank = shape
    sizes = ((samples, rows, width), (COUNT, rank, width), (COUNT, width, rank))
    tensors = [make(*size, seed=k, dtype=dtype, device=device) for k, size in enumerate(sizes, 1)]
    tasks = torch.tensor([2, 0, 0, 1], device=device)[:samples]
    return *tensors, tasks


def exact(x, down, up, tasks):
    x, down, up = (t.double() for t in (x, down, up))
    return x - (x @ down[tasks].mT).relu() @ up[tasks].mT


def thinned(down):
    """Down factors that leave most inputs out, so that the thin product is exact in bf16."""
    every = torch.arange(down.shape[-1], device=down.device) % 7 == 0
    return down * every.to(down.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape, dtype, device):
    x, down, up, tasks = inputs(whole, shape, dtype, device)
    x, up, down = x.clamp(-1, 1), up.clamp(-1, 1), thinned(down)
    y = module.residual_adapter_forward(x, down, up, tasks)
    assert torch.equal(y, exact(x, down, up, tasks).to(dtype))


def test_other_strides(device):
    x, down, up, tasks = inputs(whole, (4, 20, 40, 5), torch.bfloat16, device)
    x, up, down = x.clamp(-1, 1), up.clamp(-1, 1), thinned(down)
    expected = exact(x, down, up, tasks).bfloat16()
    strided = torch.stack([x, x], 3)[..., 0]
    down, up = down.mT.contiguous().mT, up.mT.contiguous().mT
    assert torch.equal(module.residual_adapter_forward(strided, down, up, tasks), expected)


def test_nan_and_unknown_tasks(device):
    x, down, up, tasks = inputs(whole, (4, 20, 40, 5), torch.float32, device)
    x[0, 3, 1] = float("nan")
    tasks[1], tasks[2] = COUNT, -1
    hit = module.residual_adapter_forward(x, down, up, tasks).isnan()
    assert hit.any(2).tolist() == hit.all(2).tolist()
    assert hit.any(2).sum(1).tolist() == [1, 20, 20, 0]


def test_the_largest_rank(device):
    assert importlib.import_module("fastmerge.ops.residual_adapter").TRITON_RANK == module.MAX_RANK
    x, down, up, tasks = inputs(whole, (1, 3, 20, module.MAX_RANK), torch.float32, device)
    y = module.residual_adapter_forward(x, down, up, tasks)
    assert torch.equal(y, exact(x, down, up, tasks).float())
    with pytest.raises(RuntimeError, match="rank 65, expected at most 64"):
        module.residual_adapter_forward(
            x, torch.zeros(3, 65, 20, device=device), torch.zeros(3, 20, 65, device=device), tasks
        )


@pytest.mark.parametrize("place", ["one", "samples", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager(dtype, place, device):
    """Through the op."""
    x, down, up, tasks = inputs(normal, (4, 8, 65, 6), dtype, device)
    tasks = {"one": tasks[0], "samples": tasks, "rows": tasks.repeat(8)}[place]

    def run(backend, convert=None):
        leaves = [t.detach().to(convert or t.dtype).requires_grad_() for t in (x, down, up)]
        with use_backend(backend):
            y = residual_adapter(*leaves, tasks)
            y.backward(torch.ones_like(y))
        assert all(leaf.grad.isfinite().all() for leaf in leaves)
        return y.detach()

    found, eager, truth = run("triton"), run("reference"), run("reference", torch.float64)
    sizes = [t.double().abs() for t in (x, down, up)]
    with use_backend("reference"):
        scale = residual_adapter(sizes[0], sizes[1], -sizes[2], tasks)
    assert_no_worse_than_eager(found, eager, truth, scale, dtype)
