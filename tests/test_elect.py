"""`elect` against the published steps in fp64, and its kernels against its reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastmerge import Dense, Experts
from fastmerge.ops import elect
from fastmerge.ops._bits import pack_rows, packed_shape, unpack_rows

from .samples import DTYPE_PAIRS, LAYOUTS, dtype_id, grid, laid_out, make_deltas, random

SHAPES = [(), (0,), (1,), (7,), (257,), (8193,), (0, 3), (3, 0), (5, 7), (3, 8200), (4, 3, 2, 3)]


def published(taus, cancelled="negative"):
    """The steps of EMR-Merging on stacked task vectors [K, *] in fp64."""
    total = taus.sum(0)
    sign = torch.where(total > 0, 1.0, -1.0).double()
    if cancelled == "zero":
        sign = torch.sign(total)
    agree = taus * sign > 0
    unified = sign * torch.where(agree, taus.abs(), 0).amax(0)
    return unified, agree


def check(shape, dtypes, count, experts, layout, cancelled="negative", make=make_deltas):
    base = laid_out(random(shape, dtypes[0], seed=1), layout)
    deltas = make(base, count, dtypes[1], experts, layout)
    accumulate = torch.float64 if torch.float64 in dtypes else torch.float32
    taus = [d.to(accumulate) - base.to(accumulate) if experts else d for d in deltas]
    taus = torch.stack([t.double() for t in taus])
    unified, agree = published(taus, cancelled)
    origin, form = (base, Experts(deltas)) if experts else (None, Dense(deltas))
    found = elect(form, base=origin, cancelled=cancelled)
    assert found.unified.dtype == dtypes[1] and found.unified.shape == base.shape
    assert torch.equal(found.unified, unified.to(dtypes[1]))
    assert found.masks.shape == (count, *packed_shape(base.shape))
    assert torch.equal(unpack_rows(found.masks, base.shape), agree)
    assert torch.equal(found.masks, pack_rows(agree))  # unused bits are 0
    kept = torch.where(agree, found.unified.double().abs(), 0)
    sums = torch.stack([taus.abs().view(count, -1).sum(1), kept.view(count, -1).sum(1)])
    torch.testing.assert_close(found.magnitudes, sums, rtol=2.0**-20, atol=0)
    return found


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(backend, shape, layout, experts):
    check(shape, DTYPE_PAIRS[0], 3, experts, layout)


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("count", [1, 8, 17])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes_and_counts(dtypes, count, experts):
    check((3, 331), dtypes, count, experts, "contiguous")


@pytest.mark.parametrize("cancelled", ["negative", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_exact_cancellations(dtype, cancelled):
    """Sums of eighths are exact in every dtype, so entries that add up to 0 abound."""

    def make(base, count, dtype, experts, layout):
        return [grid(tuple(base.shape), dtype, seed=k) for k in range(count)]

    found = check((23, 31), (dtype, dtype), 4, False, "contiguous", cancelled, make)
    taus = torch.stack(make(found.unified, 4, dtype, False, ""))
    zero = (taus.double().sum(0) == 0) & (taus != 0).any(0)
    assert zero.sum() > 10
    assert (found.unified[zero] < 0).all() == (cancelled == "negative")
    assert (found.unified[zero] == 0).all() == (cancelled == "zero")


def test_signs_are_compared_and_not_multiplied(backend):
    tiny = torch.tensor([1e-7, -1e-7], dtype=torch.float16)
    found = elect([tiny, tiny / 2])
    assert (found.unified == tiny).all() and found.masks.flatten().tolist() == [3, 3]


def test_nan_and_infinity(backend):
    nan, inf = math.nan, math.inf
    first = torch.tensor([nan, 1.0, inf, inf, nan])
    second = torch.tensor([2.0, nan, 1.0, -inf, nan])
    found = elect([first, second])
    assert found.unified.tolist() == [2.0, 1.0, inf, -inf, 0.0]
    masks = unpack_rows(found.masks, (5,))
    assert masks.tolist() == [
        [False, True, True, False, False],
        [True, False, True, True, False],
    ]
    assert found.magnitudes[0].isnan().all()
    assert found.magnitudes[1].tolist() == [inf, inf]


def test_one_expert_is_its_own_election(backend):
    expert, base = random((5, 9), torch.float32, 1), random((5, 9), torch.float32, 2)
    found = elect(Experts([expert]), base=base)
    assert torch.equal(found.unified, expert - base)
    assert torch.equal(found.magnitudes[0], found.magnitudes[1])


def test_the_unified_vector_in_another_dtype(backend):
    deltas = [random((4, 33), torch.float32, k) for k in range(3)]
    wide, narrow = elect(deltas), elect(deltas, dtype=torch.bfloat16)
    assert torch.equal(narrow.unified, wide.unified.bfloat16())
    assert torch.equal(narrow.masks, wide.masks)
    kept = unpack_rows(narrow.masks, (4, 33)) * narrow.unified.double().abs()
    torch.testing.assert_close(narrow.magnitudes[1], kept.flatten(1).sum(1), rtol=2.0**-20, atol=0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="cancelled must be one of negative, zero: 'mean'"):
        elect([torch.ones(3)], cancelled="mean")
    with pytest.raises(ValueError, match="format Experts need base"):
        elect(Experts([torch.ones(3)]))
    with pytest.raises(RuntimeError, match="deltas is empty"):
        elect([])
    with pytest.raises(RuntimeError, match=r"deltas\[1\] has shape \[4\], expected \[3\]"):
        elect([torch.ones(3), torch.ones(4)])
