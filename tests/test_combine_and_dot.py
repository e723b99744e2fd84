"""`combine_and_dot`: one call gives what `weighted_sum` and `coefficient_grad` give."""

from __future__ import annotations

import pytest
import torch

from fastmerge import Experts
from fastmerge.ops import coefficient_grad, combine_and_dot, weighted_sum

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


def case(size, dtypes, count, experts, layout="contiguous"):
    base = laid_out(random(size, dtypes[0], seed=1), layout)
    grad = laid_out(random(size, dtypes[0], seed=3), layout)
    deltas = make_deltas(base, count, dtypes[1], experts, layout)
    format_ = Experts(deltas) if experts else deltas
    return base, format_, random(count, torch.float32, seed=2), grad


def check(base, deltas, coefficients, grad, dtype=None):
    merged, dots = combine_and_dot(base, deltas, coefficients, grad, dtype=dtype)
    assert raw(merged) == raw(weighted_sum(base, deltas, coefficients, dtype=dtype))
    assert raw(dots) == raw(coefficient_grad(grad, deltas, base))


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_layouts(backend, size, layout, experts):
    check(*case(size, DTYPE_PAIRS[0], 3, experts, layout))


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("count", [1, 8, 17])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes_and_counts(dtypes, count, experts):
    check(*case(8211, dtypes, count, experts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_of_the_merged_weight(dtype):
    check(*case(65, DTYPE_PAIRS[1], 2, True), dtype=dtype)


def test_same_bytes_for_every_thread_count():
    arguments = case(100_003, DTYPE_PAIRS[0], 9, True)
    assert_same_bytes_for_threads(lambda: combine_and_dot(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grad_weight=torch.zeros(4)), r"grad_weight is \[4\] on cpu, expected \[5\]"),
        (dict(grad_weight=torch.zeros(5, dtype=int)), "grad_weight must be a floating-point"),
        (dict(coefficients=torch.zeros(1, 2)), r"coefficients has shape \[1, 2\], expected \[2\]"),
        (dict(deltas=[]), "deltas is empty"),
    ],
)
def test_errors_name_the_argument(change, message):
    good = dict(
        base=torch.zeros(5),
        deltas=[torch.zeros(5)] * 2,
        coefficients=torch.zeros(2),
        grad_weight=torch.zeros(5),
    )
    with pytest.raises(RuntimeError, match=message):
        combine_and_dot(**(good | change))
