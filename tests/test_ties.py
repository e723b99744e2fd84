"""`ties_merge` and `ties_masks` against the published order of operations."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmerge import Dense, Experts, use_backend
from fastmerge.ops import ties_masks, ties_merge

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
from .ties_oracle import ties_oracle
from .tolerances import assert_no_worse_than_eager

MERGES = ["mean", "sum", "max"]


def unpack(masks, size):
    bits = (masks.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :size].bool()


def task_rows(taus):
    return torch.stack([tau.flatten() for tau in taus]).double()


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_grid_values_match_the_published_steps_exactly(dtype, density, merge):
    """Sums of a few eighths are exact in every dtype: equal magnitudes and cancellations too."""
    deltas = [grid((23, 11), dtype, seed=k) for k in range(4)]
    rows = task_rows(deltas)
    expected, masks, cancelled = ties_oracle(rows, density, merge)
    assert cancelled > 0
    found = ties_merge(deltas, density=density, merge=merge)
    assert torch.equal(found.flatten(), expected.to(dtype))
    assert torch.equal(unpack(ties_masks(deltas, density=density), rows.shape[1]), masks)


@pytest.mark.parametrize("sign", [1, -1])
def test_exact_cancellations_follow_the_majority(backend, sign):
    deltas = [sign * torch.tensor([1.0, -1, 1, 2]), sign * torch.tensor([1.0, 1, 1, -2])]
    merged = ties_merge(deltas, density=1.0, merge="sum")
    assert torch.equal(merged, sign * torch.tensor([2.0, 1, 2, 2]))
    masks = unpack(ties_masks(deltas, density=1.0), 4)
    assert masks.tolist() == [[True, False, True, True], [True, True, True, False]]


def test_no_majority_needs_no_value_on_the_host():
    with FakeTensorMode():
        deltas, thresholds = [torch.zeros(9), torch.zeros(9)], torch.zeros(2)
        assert ties_merge(deltas, thresholds=thresholds).shape == (9,)
        assert ties_masks(deltas, thresholds=thresholds).shape == (2, 2)


def test_cancellations_without_a_majority_are_treated_as_negative(backend):
    deltas = [torch.tensor([3.0, -1, 2]), torch.tensor([-3.0, -1, 0])]
    assert ties_merge(deltas, density=1.0, merge="sum").tolist() == [-3, -2, 2]
    assert ties_merge(deltas, density=1.0, merge="max").tolist() == [0, -1, 2]


@pytest.mark.parametrize("majority", [-1, 0, 1])
def test_a_given_majority_is_used(backend, majority):
    deltas = [torch.tensor([3.0, 1]), torch.tensor([-3.0, 1])]
    merged = ties_merge(deltas, density=1.0, merge="sum", majority=majority)
    assert merged.tolist() == [3 if majority > 0 else -3, 2]
    masks = unpack(ties_masks(deltas, density=1.0, majority=majority), 2)
    assert masks[:, 0].tolist() == [majority > 0, majority <= 0]


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_random_values(backend, size, layout, experts):
    check_random(size, DTYPE_PAIRS[0], 3, experts, layout, "mean")


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("count", [1, 8, 17])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes_and_counts(dtypes, count, merge, experts):
    check_random(1003, dtypes, count, experts, "contiguous", merge)


def check_random(size, dtypes, count, experts, layout, merge):
    base = laid_out(random(size, dtypes[0], seed=1), layout)
    deltas = make_deltas(base, count, dtypes[1], experts, layout)
    scaling, density = 0.7, 0.3
    # the task vectors as they are in the arithmetic, so that elections have one right answer
    accumulate = torch.float64 if torch.float64 in dtypes else torch.float32
    taus = [d.to(accumulate) - base.to(accumulate) if experts else d for d in deltas]
    rows = task_rows(taus)
    merged, masks, _ = ties_oracle(rows, density, merge)
    eager, _, _ = ties_oracle(torch.stack([t.to(base.dtype) for t in taus]), density, merge)
    format_ = Experts(deltas) if experts else Dense(deltas)
    found = ties_merge(format_, density=density, base=base, scaling=scaling, merge=merge)
    assert found.dtype == base.dtype
    scale = base.double().abs() + scaling * (rows.abs() * masks).sum(0)
    truth = base.double() + scaling * merged
    plain = (base + scaling * eager).to(base.dtype)
    assert_no_worse_than_eager(found, plain, truth, scale)
    assert torch.equal(unpack(ties_masks(format_, density=density, base=base), size), masks)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
def test_native_equals_the_reference_bit_for_bit(dtypes, merge):
    base = random(8209, dtypes[0], seed=1)
    deltas = Experts(make_deltas(base, 9, dtypes[1], True))
    results = []
    for name in ("native", "reference"):
        with use_backend(name):
            results.append(raw(ties_merge(deltas, base=base, merge=merge, scaling=0.3)))
            results.append(raw(ties_masks(deltas, base=base)))
    assert results[:2] == results[2:]


def test_same_bytes_for_every_thread_count():
    deltas = [grid(100_003, torch.float32, seed=k) for k in range(5)]
    assert_same_bytes_for_threads(lambda: (ties_merge(deltas), ties_masks(deltas)))


def test_one_expert_whole_is_that_expert(backend):
    base, expert = grid(100, torch.float32, seed=1), grid(100, torch.float32, seed=2)
    assert torch.equal(ties_merge(Experts([expert]), density=1.0, base=base), expert)


def test_the_mean_of_equal_task_vectors_is_the_trimmed_one(backend):
    tau = grid(100, torch.float32, seed=3)
    trimmed = torch.where(tau.abs() >= tau.abs().sort().values[79], tau, 0)
    assert torch.equal(ties_merge([tau] * 4, density=0.2), trimmed)


def test_thresholds_replace_the_density(backend):
    deltas = [torch.tensor([1.0, -5, 3]), torch.tensor([2.0, 2, -2])]
    merged = ties_merge(deltas, thresholds=torch.tensor([3.0, 2.0]), merge="sum")
    assert merged.tolist() == [2, -5, 3]
    assert ties_merge(deltas, thresholds=torch.tensor([9.0, 9.0])).tolist() == [0, 0, 0]


def test_nan_is_trimmed(backend):
    deltas = [torch.tensor([math.nan, 2.0]), torch.tensor([1.0, 1.0])]
    assert ties_merge(deltas, thresholds=torch.zeros(2), merge="sum").tolist() == [1, 3]
    assert unpack(ties_masks(deltas, thresholds=torch.zeros(2)), 2).tolist() == [
        [False, True],
        [True, True],
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_out(dtype, layout):
    base = grid((9, 7), torch.float32, seed=1)
    deltas = [grid((9, 7), torch.float32, seed=2 + k) for k in range(3)]
    out = laid_out(torch.full((9, 7), math.nan, dtype=dtype), layout)
    assert ties_merge(deltas, base=base, merge="sum", out=out) is out
    assert torch.equal(out, ties_merge(deltas, base=base, merge="sum").to(dtype))


def test_out_must_not_be_an_input():
    deltas = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(ValueError, match="out must not be base or a delta"):
        ties_merge(deltas, out=deltas[1])


@pytest.mark.parametrize("op", [ties_merge, ties_masks])
def test_experts_need_their_base(op):
    with pytest.raises(ValueError, match="Experts need base"):
        op(Experts([torch.zeros(3)]))


@pytest.mark.parametrize("op", [ties_merge, ties_masks])
@pytest.mark.parametrize("density", [0, 1.5, -0.2])
def test_density_out_of_range(op, density):
    with pytest.raises(ValueError, match="0 < density <= 1"):
        op([torch.ones(3)], density=density)


@pytest.mark.parametrize("op", [ties_merge, ties_masks])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(deltas=[]), "deltas is empty"),
        (dict(deltas=[torch.zeros(5), torch.zeros(4)]), r"deltas\[1\] has shape \[4\]"),
        (dict(deltas=[torch.zeros(5), torch.zeros(5).half()]), r"deltas\[1\] is torch.float16"),
        (dict(thresholds=torch.zeros(3)), r"thresholds is \[3\] on cpu, expected \[2\]"),
        (dict(thresholds=torch.zeros(2, dtype=int)), "thresholds must be a floating-point"),
        (dict(majority=2), "majority must be -1, 0 or 1"),
    ],
)
def test_errors_name_the_argument(op, change, message):
    good = dict(deltas=[torch.zeros(5)] * 2, thresholds=torch.zeros(2))
    with pytest.raises(RuntimeError, match=message):
        op(**(good | change))


def test_unknown_merge():
    with pytest.raises(RuntimeError, match="merge must be one of mean, sum, max, got 'median'"):
        ties_merge([torch.zeros(5)], merge="median")
