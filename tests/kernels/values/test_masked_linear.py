"""Linear layer of masked task vectors: every row with a task or coefficients of its own."""

from __future__ import annotations

import pytest
import torch

from fastmerge import use_backend
from fastmerge.deltas import Masked
from fastmerge.kernels import masked_linear as module
from fastmerge.kernels.masked_coefficient_grad import linear_masked_coefficient_grad
from fastmerge.ops import masked_linear
from fastmerge.ops._bits import pack_rows, unpack_rows

from ...tolerances import assert_no_worse_than_eager
from .data import DTYPES, SHAPES, normal, whole


def inputs(make, rows, inner, outer, count, transpose, dtype, device):
    """x, base, unified, masks, bias and dy; the first task has no entry, the last every one."""
    shape = (inner, outer) if transpose else (outer, inner)
    chosen = whole(count, *shape, seed=6, dtype=torch.float32, device=device) > 0
    chosen[0], chosen[-1] = count == 1, True
    sizes = (rows, inner), shape, shape, (outer,), (rows, outer)
    x, base, unified, bias, dy = (
        make(*size, seed=k, dtype=dtype, device=device) for k, size in enumerate(sizes, 1)
    )
    return x, base, unified, pack_rows(chosen), bias, dy


def coefficients(samples, count, device, kind):
    """Whole numbers: a task or none for every sample, anything, or a scale for each task alone."""
    lam = whole(samples, count, seed=9, dtype=torch.float32, device=device, size=3)
    if kind == "any":
        return lam
    ids = whole(samples, seed=10, dtype=torch.int64, device=device, size=count) % (count + 1)
    chosen = torch.nn.functional.one_hot(ids, count + 1)[:, :count].float()
    return chosen * (torch.arange(count, device=device) % 3 + 1 if kind == "task" else lam)


def truth(x, base, unified, masks, lam, transpose):
    """x_r W_r^T, W_r and the task vectors, all as [O, I] in fp64; lam [R, K]."""
    taus = torch.where(unpack_rows(masks, unified.shape), unified.double(), 0)
    weight = base.double() + torch.einsum("rk,koi->roi", lam.double(), taus)
    if transpose:
        taus, weight = taus.mT, weight.mT
    return torch.einsum("ri,roi->ro", x.double(), weight), weight, taus


def check_exact(rows, inner, outer, count, transpose, dtype, device, samples=None, kind="task"):
    x, base, unified, masks, bias, dy = inputs(
        whole, rows, inner, outer, count, transpose, dtype, device
    )
    samples = rows if samples is None else samples
    lam = coefficients(samples, count, device, kind)
    per_row = lam.repeat_interleave(rows // max(1, samples), 0)
    expected, weight, taus = truth(x, base, unified, masks, per_row, transpose)
    layer = base, unified, masks, lam
    y = module.masked_linear_forward(x, *layer, bias, transpose)
    assert torch.equal(y, (expected + bias.double()).to(dtype))
    dx = torch.einsum("ro,roi->ri", dy.double(), weight).to(dtype)
    assert torch.equal(module.masked_linear_forward(dy, *layer, None, not transpose), dx)
    found, grad = module.masked_linear_backward(dy, x, *layer, transpose)
    assert torch.equal(found, dx)
    dots = torch.einsum("ro,koi,ri->rk", dy.double(), taus, x.double())
    assert grad.dtype == torch.float32 and torch.equal(grad.double(), dots)
    grad = linear_masked_coefficient_grad(dy, x, unified, masks, transpose)
    assert grad.dtype == torch.float32 and torch.equal(grad.double(), dots.sum(0))


CASES = [(shape, DTYPES[(i + 2) % 3]) for i, shape in enumerate(SHAPES)]
CASES += [((17, 65, 40), dtype) for dtype in DTYPES]


@pytest.mark.parametrize("transpose", [False, True], ids=["oi", "io"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_exact(shape, dtype, transpose, device):
    check_exact(*shape, 3, transpose, dtype, device)


@pytest.mark.parametrize(
    ("samples", "kind"), [(1, "any"), (2, "task"), (10, "scaled"), (70, "any")], ids=str
)
def test_samples(samples, kind, device):
    """Also tiles of several tasks, and rows of one task with coefficients of their own."""
    check_exact(70, 33, 40, 3, False, torch.bfloat16, device, samples, kind)


@pytest.mark.parametrize("count", [1, 17])
def test_counts(count, device):
    check_exact(20, 7, 20, count, True, torch.bfloat16, device)


def test_large_tiles(device):
    check_exact(520, 48, 80, 2, False, torch.bfloat16, device, samples=8)


def test_samples_lie_by_task(device):
    lam = torch.zeros(150, 4, device=device)
    tasks = whole(150, seed=3, dtype=torch.int64, device=device) + 2  # 4: none
    lam[torch.arange(150), tasks.clamp(max=3)] = (tasks < 4).float() * -0.5
    lam[7] = lam[100] = 1.0
    keys = torch.where(tasks < 4, tasks + 1, 0)
    keys[7] = keys[100] = 5
    for values in (lam, lam.t().contiguous().t()):
        assert torch.equal(module.task_order(values), keys.argsort(stable=True).int())
    assert module.task_order(lam[:1]) is None


def test_a_task_stays_with_its_rows(device):
    """What one task's weights are says nothing about another task's rows, in a shared tile too."""
    x, base, unified, masks, bias, _ = inputs(whole, 6, 20, 30, 2, False, torch.float32, device)
    masks = pack_rows(torch.ones(2, 30, 20, device=device) > torch.tensor([[[0.0]], [[2.0]]]))
    unified[:] = float("nan")
    lam = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], device=device)
    y = module.masked_linear_forward(x, base, unified, masks, lam, bias, False)
    assert y.isnan().any(1).tolist() == [True, True, False, False, False, False]


def test_views_and_other_strides(device):
    x, base, unified, masks, bias, _ = inputs(whole, 12, 40, 50, 3, False, torch.float16, device)
    lam = coefficients(6, 3, device, "task")
    expected, *_ = truth(x, base, unified, masks, lam.repeat_interleave(2, 0), False)
    strided = torch.stack([x, x], 2)[..., 0]
    weights = base.t().contiguous().t(), unified.t().contiguous().t(), masks
    y = module.masked_linear_forward(strided, *weights, lam.t().contiguous().t(), bias, False)
    assert torch.equal(y, (expected + bias.double()).half())
    part = base[7:], unified[7:], masks[:, 7:]
    y = module.masked_linear_forward(x, *part, lam, None, False)
    assert torch.equal(y, expected[:, 7:].half())


@pytest.mark.parametrize("own", [(4, 1), (1, 8), (), (4, 8)], ids=str)
@pytest.mark.parametrize("transpose", [False, True], ids=["oi", "io"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager(dtype, transpose, own, device):
    """Through the op, whose coefficients broadcast to the rows."""
    x, base, unified, masks, bias, dy = inputs(normal, 32, 65, 40, 3, transpose, dtype, device)
    x, dy = x.view(4, 8, 65), dy.view(4, 8, 40)
    lam = normal(*own, 3, seed=9, dtype=torch.float32, device=device)
    if len(own) == 2:  # some rows of one task, of none, and of several
        lam[0] *= torch.tensor([1.0, 0.0, 0.0], device=device)
        lam[-1, -1] = 0

    def run(backend, convert=None, absolute=False):
        tensors = [t.abs() if absolute else t for t in (x, lam, bias, base, unified, dy)]
        tensors = [t.to(convert or t.dtype) for t in tensors]
        leaves = [t.detach().clone().requires_grad_() for t in tensors[:3]]
        with use_backend(backend):
            y = masked_linear(
                leaves[0], *tensors[3:5], masks, leaves[1], leaves[2], transpose=transpose
            )
            y.backward(tensors[5].to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    found, eager = run("triton"), run("reference")
    exact, sizes = run("reference", torch.float64), run("reference", torch.float64, True)
    for a, b, c, scale in zip(found, eager, exact, sizes, strict=True):
        assert_no_worse_than_eager(a, b, c, scale, dtype)


def test_a_merged_weight_reaches_the_kernel(device):
    x, base, unified, masks, _, _ = inputs(whole, 12, 40, 50, 3, False, torch.float32, device)
    lam = coefficients(6, 3, device, "any").view(6, 1, 3)
    deltas = Masked(unified, masks)
    with use_backend("triton"):
        y = deltas.merged_linear(x.view(6, 2, 40), base, lam)
    expected, *_ = truth(x, base, unified, masks, lam[:, 0].repeat_interleave(2, 0), False)
    assert torch.equal(y.view(12, 50), expected.float())
