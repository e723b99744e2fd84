"""The CPU kernel of many weighted sums of one tensor, at every instruction-set level."""

from __future__ import annotations

import pytest
import torch

from fastmerge import _native
from fastmerge._native import cpu

from .levels import same_everywhere
from .samples import DTYPE_PAIRS, dtype_id, make_deltas, random, raw, task_vectors
from .tolerances import assert_no_worse_than_eager

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.unavailable_reason())

NAN = float("nan")
SHAPES = [(0, 5), (5, 0), (1, 1), (3, 17), (9, 16), (2, 513), (37, 250), (1, 9000)]


def check(shape, groups, count, dtypes=DTYPE_PAIRS[0], experts=True, cut=None, zeros=False):
    base = random(shape, dtypes[0], seed=1)
    deltas = make_deltas(base, count, dtypes[1], experts)
    if cut is not None:
        base, deltas = base[:, cut], [d[:, cut] for d in deltas]
    lam = random((groups, count), torch.float32, seed=2)
    if zeros:
        lam *= random((groups, count), torch.float32, seed=4) > 0
    grad = random((groups, *base.shape), dtypes[0], seed=3)

    def run():
        out = torch.full((2, groups, *base.shape), NAN, dtype=dtypes[0])
        cpu.combine_rows(base, deltas, lam, out[0], None, experts)
        alone = cpu.combine_rows(base, deltas, lam, None, grad, experts)
        both = cpu.combine_rows(base, deltas, lam, out[1], grad, experts)
        return out[0], out[1], alone, both

    merged, merged_too, alone, both = same_everywhere(run)
    assert raw(merged) == raw(merged_too) and raw(alone) == raw(both)
    plain, flat = base.contiguous(), [d.contiguous() for d in deltas]
    for g in range(groups):
        expected = torch.full(base.shape, NAN, dtype=dtypes[0])
        cpu.weighted_sum([plain], [flat], lam[g : g + 1].contiguous(), [expected], experts)
        assert torch.equal(merged[g], expected)
    taus = torch.stack(task_vectors(base, deltas, experts)).flatten(1)  # [K, n]
    eager_taus = [d.float() - base.float() if experts else d.float() for d in deltas]
    eager = grad.float().flatten(1) @ torch.stack(eager_taus).flatten(1).t()
    products = grad.double().flatten(1), taus
    truth, scale = products[0] @ products[1].t(), products[0].abs() @ products[1].abs().t()
    assert_no_worse_than_eager(alone, eager, truth, scale, dtype=torch.float32)


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, experts):
    check(shape, 3, 3, experts=experts)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 300])
def test_counts(count):
    check((3, 150), 2, count)


@pytest.mark.parametrize("zeros", [False, True], ids=["all", "some-zero"])
@pytest.mark.parametrize("groups", [0, 1, 19])
def test_groups(groups, zeros):
    check((4, 70), groups, 17, zeros=zeros)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
def test_dtypes(dtypes):
    check((5, 100), 3, 9, dtypes)


@pytest.mark.parametrize("cut", [slice(0, 40), slice(3, 100), slice(7, 8)], ids=str)
def test_columns_of_a_tensor(cut):
    check((70, 101), 2, 3, cut=cut)


def test_a_zero_coefficient_leaves_its_task_vector_out():
    base, deltas = torch.ones(2, 20), [torch.full((2, 20), NAN), torch.ones(2, 20)]
    lam = torch.tensor([[0.0, 2.0], [1.0, 2.0], [NAN, 0.0], [0.0, -0.0]])
    (out,) = same_everywhere(lambda: (_merged(base, deltas, lam),))
    assert torch.equal(out[0], torch.full((2, 20), 3.0)) and torch.equal(out[3], base)
    assert out[1:3].isnan().all()


def _merged(base, deltas, lam):
    out = torch.full((len(lam), *base.shape), NAN)
    cpu.combine_rows(base, deltas, lam, out)
    return out
