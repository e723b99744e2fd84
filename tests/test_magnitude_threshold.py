"""`magnitude_threshold`: the exact magnitude at a rank, against sorting."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from fastmerge import use_backend
from fastmerge.ops import magnitude_threshold

from .samples import (
    DTYPES,
    LAYOUTS,
    assert_same_bytes_for_threads,
    dtype_id,
    grid,
    laid_out,
    random,
)


def by_sorting(magnitudes, density):
    """c = the k-th smallest magnitude, k = D - floor(D * density), at least 1."""
    ordered = magnitudes.flatten().sort().values
    k = max(1, len(ordered) - int(len(ordered) * density))
    return ordered[k - 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 255, 257, 8193])
def test_density(backend, size, density, layout):
    values = laid_out(random(size, torch.float32, seed=1), layout)
    assert magnitude_threshold(values, density=density) == by_sorting(values.abs(), density)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_rank(dtype):
    values = random((7, 13), dtype, seed=2)
    ordered = values.abs().flatten().sort(descending=True).values
    for rank in (1, 2, 45, 90, 91):
        found = magnitude_threshold(values, rank=rank)
        assert found.dim() == 0 and found == ordered[rank - 1]
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_experts_are_subtracted_in_fp32(dtype):
    base, expert = random(1001, dtype, seed=1), random(1001, dtype, seed=2)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    expected = by_sorting((expert.to(exact) - base.to(exact)).abs(), 0.2)
    assert magnitude_threshold(expert, density=0.2, base=base) == expected


def test_several_tensors_are_one_vector(backend):
    parts = [random(s, torch.float32, 3 + i) for i, s in enumerate([(3, 5), (0,), (), (1000,)])]
    together = torch.cat([p.flatten() for p in parts])
    assert magnitude_threshold(parts, density=0.3) == by_sorting(together.abs(), 0.3)
    zeros = [torch.zeros_like(p) for p in parts]
    assert magnitude_threshold(parts, density=0.3, base=zeros) == by_sorting(together.abs(), 0.3)


def test_tensors_of_several_dtypes_are_one_vector():
    parts = [random(100, dtype, seed=i) for i, dtype in enumerate(DTYPES)]
    expected = by_sorting(torch.cat([p.double() for p in parts]).abs(), 0.4)
    assert magnitude_threshold(parts, density=0.4) == expected


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
def test_one_more_than_the_density_is_kept_when_magnitudes_differ(backend, density):
    values = (torch.randperm(1000, generator=torch.Generator().manual_seed(0)) + 1.0) / 7
    kept = values >= magnitude_threshold(values, density=density)
    assert int(kept.sum()) == math.floor(1000 * density) + 1


def test_equal_magnitudes_are_all_kept(backend):
    values = grid(1000, torch.float32, seed=4, span=1)
    threshold = magnitude_threshold(values, density=0.1)
    assert threshold == 1 / 8 and int((values.abs() >= threshold).sum()) > 500


def test_the_product_with_the_density_is_in_double_precision(backend):
    values = torch.arange(1, 101).float()
    # 100 * 0.29 is 28.999999999999996 in double precision: one entry fewer than 29 + 1
    assert magnitude_threshold(values, density=0.29) == 100 - math.floor(100 * 0.29)
    assert math.floor(100 * 0.29) == 28


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 2.5e-38, 1.0, 3.4e38, math.inf])
def test_one_magnitude_only(backend, magnitude):
    values = torch.tensor([magnitude, -magnitude] * 50)
    for density in (0.01, 0.5, 1.0):
        assert magnitude_threshold(values, density=density) == values[0]


def test_neighbouring_numbers_are_told_apart(backend):
    """Magnitudes that differ in the last bit, which only the second histogram sees."""
    first = torch.tensor(1.5).view(torch.int32)
    values = (first + torch.randperm(2000, dtype=torch.int32)).view(torch.float32)
    ordered = values.sort(descending=True).values
    for rank in (1, 1000, 2000):
        assert magnitude_threshold(-values, rank=rank) == ordered[rank - 1]


def test_nan_counts_as_the_largest(backend):
    values = torch.tensor([1.0, math.nan, math.inf, -2.0, -math.nan])
    found = [magnitude_threshold(values, rank=rank).item() for rank in range(1, 6)]
    assert math.isnan(found[0]) and math.isnan(found[1])
    assert found[2:] == [math.inf, 2.0, 1.0]


@pytest.mark.parametrize("empty", [torch.zeros(0), [torch.zeros(0), torch.zeros(3, 0)]], ids=len)
def test_no_entries_give_zero(backend, empty):
    assert magnitude_threshold(empty, density=0.5) == 0


def test_same_bytes_for_every_thread_count():
    values = random(300_001, torch.float32, seed=5)
    assert_same_bytes_for_threads(lambda: (magnitude_threshold(values, density=0.2),))


def test_native_histograms_equal_the_reference():
    base, expert = random(9001, torch.bfloat16, seed=1), random(9001, torch.bfloat16, seed=2)
    histogram = torch.ops.fastmerge.magnitude_histogram
    counts = []
    for name in ("native", "reference"):
        with use_backend(name):
            high = histogram(expert, base, 0, 0, False)
            counts.append((high, histogram(expert, base, 1, int(high.argmax()), False)))
    assert torch.equal(counts[0][0], counts[1][0]) and torch.equal(counts[0][1], counts[1][1])
    assert counts[0][0].sum() == 9001 and counts[0][1].sum() == counts[0][0].max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "give either rank or density"),
        (dict(rank=1, density=0.5), "give either rank or density"),
        (dict(rank=0), r"rank must be in 1..5, got 0"),
        (dict(rank=6), r"rank must be in 1..5, got 6"),
        (dict(density=0), "0 < density <= 1, got 0"),
        (dict(density=20), "0 < density <= 1, got 20"),
        (dict(density=math.nan), "0 < density <= 1, got nan"),
        (dict(density="0.2"), "0 < density <= 1, got '0.2'"),
        (dict(density=0.5, deltas=[]), "empty list"),
        (dict(density=0.5, base=[torch.zeros(5)] * 2), "2 base tensors, 1 deltas"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        magnitude_threshold(**(dict(deltas=torch.arange(5.0)) | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(base=torch.zeros(4)), r"base is \[4\] on cpu, expected \[5\]"),
        (dict(base=torch.zeros(5, dtype=int)), "base must be a floating-point tensor"),
        (dict(deltas=torch.arange(5)), "delta must be a floating-point tensor, got torch.int64"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        magnitude_threshold(**(dict(deltas=torch.arange(5.0), density=0.5) | arguments))


def test_a_sampled_bracket_finds_the_exact_magnitude(backend, monkeypatch):
    """Large vectors are sampled; the result is that of sorting, whatever the sample says."""
    module = sys.modules["fastmerge.ops.magnitude_threshold"]
    monkeypatch.setattr(module, "SAMPLED_FROM", 1 << 12)
    monkeypatch.setattr(module, "MAX_BRACKET", 1 << 23)  # few entries are sampled here
    reads = []
    bracket_op, histogram = module.magnitude_bracket, module._exact
    monkeypatch.setattr(
        module, "magnitude_bracket", lambda *a, **k: reads.append("bracket") or bracket_op(*a, **k)
    )
    monkeypatch.setattr(module, "_exact", lambda *a: reads.append("exact") or histogram(*a))
    smooth = random(40_000, torch.float32, seed=5)
    # every sampled entry is a thousand times smaller than the others
    misleading = smooth.clone()
    misleading[: 40_000 // 256 * 256].view(-1, 256)[:, :16] *= 1e-3
    cases = {
        "smooth": (smooth, ["bracket"]),
        "misleading": (misleading, ["bracket", "exact"]),
        "equal": (torch.full((40_000,), -0.5), ["bracket"]),
        "zeros": (torch.where(smooth > 1, smooth, 0.0), ["bracket"]),
        "nan": (torch.where(smooth > 0, smooth, math.nan), ["bracket"]),
    }
    for name, (values, expected_reads) in cases.items():
        for density in (0.01, 0.2, 1.0):
            reads.clear()
            found = magnitude_threshold(values, density=density)
            expected = by_sorting(values.abs(), density)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            if density == 0.2:
                assert reads == expected_reads, name


def test_a_sample_over_experts_in_several_tensors(backend, monkeypatch):
    module = sys.modules["fastmerge.ops.magnitude_threshold"]
    monkeypatch.setattr(module, "SAMPLED_FROM", 1 << 12)
    monkeypatch.setattr(module, "MAX_BRACKET", 1 << 23)
    bases = [random(s, torch.bfloat16, 3 + i) for i, s in enumerate([(300, 70), (17,), (9000,)])]
    experts = [b + 0.1 * random(tuple(b.shape), torch.bfloat16, 9) for b in bases]
    pairs = zip(experts, bases, strict=True)
    together = torch.cat([(e.float() - b.float()).flatten() for e, b in pairs])
    found = magnitude_threshold(experts, density=0.3, base=bases)
    assert found == by_sorting(together.abs(), 0.3)
