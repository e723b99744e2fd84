"""row_gram, exact_sums and task_variance against fp64 and exact arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from fastmerge import use_backend
from fastmerge.ops import exact_sums, exact_value, row_gram, task_variance

from .samples import (
    DTYPE_PAIRS,
    LAYOUTS,
    SIZES,
    assert_same_bytes_for_threads,
    dtype_id,
    laid_out,
    make_deltas,
    random,
    raw,
)
from .tolerances import assert_no_worse_than_eager


@pytest.mark.parametrize("width", [1, 15, 16, 130, 4000])
@pytest.mark.parametrize("count", [1, 4, 9, 17])
def test_gram(backend, count, width):
    base = random((3, width), torch.bfloat16, 1)
    deltas = make_deltas(base, count, torch.float32, True)
    taus = torch.stack([(d - base.float()).double() for d in deltas], 1)  # [rows, K, width]
    found = row_gram(deltas, base=base)
    i, j = torch.triu_indices(count, count)
    expected = (taus @ taus.mT)[:, i, j]
    scale = (taus.abs() @ taus.abs().mT)[:, i, j]
    assert found.shape == expected.shape
    assert_no_worse_than_eager(found, expected, expected, width * scale)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
def test_native_equals_the_reference_bit_for_bit(dtypes):
    base = random((7, 333), dtypes[0], 1)
    deltas = make_deltas(base, 10, dtypes[1], True)
    results = []
    for name in ("native", "reference"):
        with use_backend(name):
            gram = row_gram(deltas, base=base)
            variance = task_variance(deltas, base=base)
            results.append([raw(gram), raw(exact_sums(gram)), raw(variance)])
    assert results[0] == results[1]


def test_same_bytes_for_every_thread_count():
    deltas = [random((307, 331), torch.float32, k) for k in range(5)]
    assert_same_bytes_for_threads(lambda: (row_gram(deltas), task_variance(deltas)))


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0, -0.0],
        [1.0, 1e-30, -1.0],
        [1e300, 1e-300, -1e300],
        [5e-324, 5e-324],
        [-5e-324, 2.2250738585072014e-308],
        [1.7976931348623157e308, -1.7976931348623157e308, 3.0],
        [0.1] * 10,
        [2.0**e for e in range(-1074, 1000, 7)],
        [-(2.0**e) * (1 + 2**-52) for e in range(-1000, 1000, 31)],
    ],
)
def test_exact_sums_are_rounded_once(backend, values):
    limbs = exact_sums(torch.tensor(values, dtype=torch.float64).unsqueeze(1))
    assert exact_value(limbs[0]) == math.fsum(values)


def test_exact_sums_add_up_over_blocks_in_any_order(backend):
    values = random((5000, 2), torch.float64, 1) * (30 * random((5000, 2), torch.float64, 2)).exp()
    whole = exact_sums(values)
    parts = [exact_sums(part) for part in values.split(777)]
    assert torch.equal(sum(reversed(parts)), whole)
    assert torch.equal(exact_sums(values.flip(0)), whole)
    for column in range(2):
        assert exact_value(whole[column]) == math.fsum(values[:, column].tolist())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_makes_the_sum_nan(backend, bad):
    limbs = exact_sums(torch.tensor([[1.0, 1.0], [bad, 2.0]], dtype=torch.float64))
    assert math.isnan(exact_value(limbs[0])) and exact_value(limbs[1]) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES[1:])
def test_variance(backend, size, layout):
    base = laid_out(random(size, torch.float32, 1), layout)
    deltas = make_deltas(base, 5, torch.float32, True, layout)
    taus = torch.stack([d - base for d in deltas])
    truth = taus.double().var(0, unbiased=False)
    found = task_variance(deltas, base=base)
    assert found.dtype == torch.float32
    scale = taus.double().square().sum(0)
    assert_no_worse_than_eager(found, taus.var(0, unbiased=False), truth, scale)


def test_equal_task_vectors_have_no_variance(backend):
    tau = random(100, torch.float32, 1)
    assert task_variance([tau, tau]).count_nonzero() == 0
    assert task_variance([tau]).count_nonzero() == 0
