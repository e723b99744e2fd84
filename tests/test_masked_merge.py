"""masked_merge and masked_sums against fp64, and their kernels against their references."""

from __future__ import annotations

import pytest
import torch

from fastmerge import use_backend
from fastmerge.deltas import Dense, Experts
from fastmerge.ops import masked_merge, masked_sums
from fastmerge.ops._bits import pack_bits

from .samples import (
    DTYPE_PAIRS,
    LAYOUTS,
    SIZES,
    assert_same_bytes_for_threads,
    dtype_id,
    grid,
    laid_out,
    make_deltas,
    random,
    raw,
)
from .tolerances import assert_no_worse_than_eager


def oracle(taus, factors, masks, elect, normalize, least):
    """The formula in the dtype of the task vectors."""
    votes, values, weights = factors.to(taus[0].dtype)
    x = [t * m for t, m in zip(taus, masks, strict=True)]
    if not elect:
        return sum(v * t for v, t in zip(values, x, strict=True))
    ballots = [v * t for v, t in zip(votes, x, strict=True)]
    positive = sum(ballots) >= 0
    agree = [torch.where(positive, b > 0, b < 0) for b in ballots]
    merged = sum(v * t * a for v, t, a in zip(values, x, agree, strict=True))
    if not normalize:
        return merged
    divisor = sum(w * a for w, a in zip(weights, agree, strict=True))
    divisor = divisor.clamp(min=least) if least else divisor
    return merged / torch.where(divisor == 0, 1, divisor)


def masks_for(count, size):
    return torch.stack([random(size, torch.float32, 70 + k) > -0.3 for k in range(count)])


def check(size, dtypes, count, experts, layout, elect, normalize, least=0.0):
    base = laid_out(random(size, dtypes[0], 1), layout)
    deltas = make_deltas(base, count, dtypes[1], experts, layout)
    masks = masks_for(count, size)
    packed = torch.stack([pack_bits(mask) for mask in masks])
    factors = torch.linspace(-0.5, 2, 3 * count).view(3, count)
    accumulate = torch.float64 if torch.float64 in dtypes else torch.float32
    taus = [d.to(accumulate) - base.to(accumulate) if experts else d.to(accumulate) for d in deltas]
    arguments = (factors, masks, elect, normalize, least)
    truth = base.double() + 0.7 * oracle([t.double() for t in taus], *arguments)
    eager = (base.to(accumulate) + 0.7 * oracle(taus, *arguments)).to(dtypes[0])
    format_ = Experts(deltas) if experts else Dense(deltas)
    found = masked_merge(
        format_,
        factors,
        masks=packed,
        base=base,
        elect=elect,
        normalize=normalize,
        least=least,
        scaling=0.7,
    )
    assert found.dtype == base.dtype
    scale = base.double().abs() + 4 * sum(t.double().abs() for t in taus)
    assert_no_worse_than_eager(found, eager, truth, scale)


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_layouts(backend, size, layout, elect):
    check(size, DTYPE_PAIRS[0], 3, True, layout, elect, elect)


@pytest.mark.parametrize(
    "mode", [(False, False, 0.0), (True, False, 0.0), (True, True, 0.0), (True, True, 0.4)]
)
@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("count", [1, 17])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes_counts_and_modes(dtypes, count, experts, mode):
    check(1003, dtypes, count, experts, "contiguous", *mode)


@pytest.mark.parametrize("normalize", [False, True])
def test_grid_values_are_exact(backend, normalize):
    """Elections that cancel exactly, + for those, and divisors that are 0."""
    size = 4001
    deltas = [grid(size, torch.bfloat16, 3 + k) for k in range(4)]
    masks = masks_for(4, size)
    packed = torch.stack([pack_bits(mask) for mask in masks])
    factors = torch.tensor([[1.0, 1, 1, 1], [1, 2, -1, 0.5], [1, 1, -2, 1]])
    found = masked_merge(
        deltas, factors, masks=packed, elect=True, normalize=normalize, dtype=torch.float32
    )
    truth = oracle([d.double() for d in deltas], factors, masks, True, normalize, 0)
    total = sum(d.double() * m for d, m in zip(deltas, masks, strict=True))
    assert int(((total == 0) & (truth != 0)).sum()) > 10
    assert torch.equal(found, truth.float())


def test_one_mask_for_all_and_none(backend):
    deltas = [grid(100, torch.float32, k) for k in range(3)]
    mask = random(100, torch.float32, 5) > 0
    factors = torch.ones(3, 3)
    found = masked_merge(deltas, factors, masks=pack_bits(mask).unsqueeze(0))
    assert torch.equal(found, sum(deltas) * mask)
    assert torch.equal(masked_merge(deltas, factors), sum(deltas))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("width", [1, 7, 16, 63, 1008])
def test_sums(backend, width, square):
    size = 1008
    base = random(size, torch.bfloat16, 1)
    deltas = make_deltas(base, 3, torch.bfloat16, True)
    masks = masks_for(3, size)
    packed = torch.stack([pack_bits(mask) for mask in masks])
    taus = torch.stack([d.double() - base.double() for d in deltas]).float().double()
    expected = (taus.square() if square else taus.abs()).view(3, -1, width)
    kept = expected * masks.view(3, -1, width)
    found = masked_sums(deltas, masks=packed, base=base, width=width, square=square)
    assert found.shape == (size // width, 2, 3) and found.dtype == torch.float64
    for half, values in ((0, expected), (1, kept)):
        truth = values.sum(-1)
        assert_no_worse_than_eager(found[:, half].T, truth, truth, width * truth)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
def test_native_equals_the_reference_bit_for_bit(dtypes):
    base = random(8209, dtypes[0], 1)
    deltas = make_deltas(base, 9, dtypes[1], True)
    packed = torch.stack([pack_bits(mask) for mask in masks_for(9, 8209)])
    factors = random((3, 9), torch.float32, 2)
    results = []
    for name in ("native", "reference"):
        with use_backend(name):
            results.append(
                [
                    *(
                        raw(masked_merge(Experts(deltas), factors, masks=packed, base=base, **how))
                        for how in ({}, {"elect": True}, {"elect": True, "normalize": True})
                    ),
                    raw(masked_sums(deltas, masks=packed, base=base, width=8209)),
                ]
            )
    assert results[0] == results[1]


def test_same_bytes_for_every_thread_count():
    deltas = [random((307, 331), torch.float32, k) for k in range(5)]
    packed = torch.stack([pack_bits(mask) for mask in masks_for(5, 307 * 331)])
    factors = random((3, 5), torch.float32, 2)
    assert_same_bytes_for_threads(
        lambda: (
            masked_merge(deltas, factors, masks=packed, elect=True),
            masked_sums(deltas, masks=packed),
        )
    )


def test_errors_name_the_argument():
    with pytest.raises(RuntimeError, match=r"factors is \[3, 2\]"):
        masked_merge([torch.ones(4)], torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="normalize needs elect"):
        masked_merge([torch.ones(4)], torch.ones(3, 1), normalize=True)
    with pytest.raises(RuntimeError, match="experts need base"):
        masked_merge(Experts([torch.ones(4)]), torch.ones(3, 1))
    with pytest.raises(RuntimeError, match=r"masks is torch.uint8 \[2, 1\]"):
        masked_sums([torch.ones(4)], masks=torch.zeros(2, 1, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="width 3 does not divide 4 entries"):
        masked_sums([torch.ones(4)], width=3)
