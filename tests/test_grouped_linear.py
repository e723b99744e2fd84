"""The CPU kernel that merges tiles and multiplies them with groups of rows, at every level."""

from __future__ import annotations

import pytest
import torch

from fastmerge import _native
from fastmerge._native import cpu

from .levels import same_everywhere
from .samples import DTYPE_PAIRS, dtype_id, make_deltas, random, task_vectors
from .tolerances import assert_no_worse_than_eager

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.unavailable_reason())

NAN = float("nan")
# (outputs, inputs): nothing, one entry, around the sizes of panels and tiles.
SHAPES = [(0, 5), (5, 0), (1, 1), (17, 3), (33, 127), (31, 129), (100, 40), (130, 260)]


def check(
    shape,
    sizes,
    count,
    dtypes=DTYPE_PAIRS[0],
    experts=True,
    transpose=False,
    bias=True,
    zeros=0,
    whole=False,
):
    """Against fp64; with whole numbers, whose sums no order of additions rounds, exactly."""
    base = random(shape[::-1] if transpose else shape, dtypes[0], seed=1)
    deltas = make_deltas(base, count, dtypes[1], experts)
    lam = random((len(sizes), count), torch.float32, seed=2)
    if zeros:
        lam[::zeros, :-1] = 0
    wide = random((sum(sizes), shape[1] + 3), torch.float32, seed=3)
    x = wide[:, 1 : shape[1] + 1]  # rows apart from each other, at odd addresses
    generator = torch.Generator().manual_seed(4)
    order = torch.randperm(len(x), generator=generator)
    added = random(shape[0], torch.float32, seed=5) if bias else None
    if whole:
        for tensor in (base, *deltas, lam, x, *([added] if bias else [])):
            tensor.mul_(2).round_()
    (y,) = same_everywhere(
        lambda: (cpu.grouped_linear(x, base, deltas, lam, sizes, order, added, experts, transpose),)
    )
    taus = task_vectors(base, deltas, experts)  # fp64
    eager, truth, scale = (torch.zeros(y.shape, dtype=torch.float64) for _ in range(3))
    eager = eager.float()
    start = 0
    for row, size in zip(lam, sizes, strict=True):
        rows = order[start : start + size]
        weight, plain, size_of = base.double(), base.float(), base.double().abs()
        for coefficient, tau, delta in zip(row, taus, deltas, strict=True):
            weight = weight + coefficient.double() * tau
            plain = plain + coefficient * (delta.float() - base.float() if experts else delta)
            size_of = size_of + (coefficient * tau).abs()
        weight, plain, size_of = (w if transpose else w.t() for w in (weight, plain, size_of))
        truth[rows], eager[rows] = x[rows].double() @ weight, x[rows] @ plain
        scale[rows] = x[rows].double().abs() @ size_of
        start += size
    if bias:
        truth, eager, scale = truth + added.double(), eager + added, scale + added.abs()
    if whole:
        assert torch.equal(y.double(), truth)
    else:
        assert_no_worse_than_eager(y, eager, truth, scale)


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, transpose):
    check(shape, [3, 1, 4], 3, transpose=transpose, bias=shape[0] % 2 == 1, whole=True)


@pytest.mark.parametrize("sizes", [[], [1], [14, 15, 13], [29], [2] * 19], ids=str)
@pytest.mark.parametrize("zeros", [0, 1, 2], ids=["all", "zeros-alike", "zeros-differ"])
def test_groups(sizes, zeros):
    check((40, 50), sizes, 3, zeros=zeros, whole=True)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 17, 60])
def test_counts(count):
    check((70, 20), [2, 3], count, transpose=count % 2 == 0, whole=True)


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
def test_dtypes(dtypes, experts):
    check((35, 21), [4, 2], 2, dtypes, experts, whole=True)


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
def test_rounding(experts, transpose):
    check((40, 5), [4, 16], 3, experts=experts, transpose=transpose)


def test_a_row_does_not_depend_on_its_neighbours():
    base, lam = random((40, 300), torch.float32, 1), random((5, 2), torch.float32, 2)
    deltas, x = make_deltas(base, 2, torch.float32, True), random((30, 300), torch.float32, 3)
    sizes = [14, 1, 5, 7, 3]
    (whole,) = same_everywhere(lambda: (cpu.grouped_linear(x, base, deltas, lam, sizes),))
    rows = torch.repeat_interleave(lam, torch.tensor(sizes), dim=0)
    for i in range(len(x)):
        alone = cpu.grouped_linear(x[i : i + 1], base, deltas, rows[i : i + 1], [1])
        assert torch.equal(alone[0], whole[i])


def test_a_zero_coefficient_leaves_its_task_vector_out():
    base, deltas = torch.ones(3, 20), [torch.full((3, 20), NAN), torch.ones(3, 20)]
    lam = torch.tensor([[0.0, 2.0], [-0.0, 1.0], [1.0, 2.0], [NAN, 0.0], [0.0, 0.0]])
    x = torch.ones(5, 20)
    (y,) = same_everywhere(lambda: (cpu.grouped_linear(x, base, deltas, lam, [1] * 5),))
    assert y[[0, 1, 4], 0].tolist() == [60, 40, 20]
    assert y[2:4].isnan().all()
