"""`coefficient_grad`: K inner products of a weight gradient with the task vectors."""

from __future__ import annotations

import pytest
import torch

from fastmerge import Experts, use_backend
from fastmerge.ops import coefficient_grad

from .samples import (
    DTYPE_PAIRS,
    LAYOUTS,
    SIZES,
    assert_same_bytes_for_threads,
    dtype_id,
    laid_out,
    make_deltas,
    random,
    task_vectors,
)
from .tolerances import assert_no_worse_than_eager


def case(size, dtypes, count, experts, layout="contiguous"):
    base = laid_out(random(size, dtypes[0], seed=1), layout)
    grad = laid_out(random(size, dtypes[0], seed=3), layout)
    return grad, base, make_deltas(base, count, dtypes[1], experts, layout)


def compute(grad, base, deltas, experts):
    return coefficient_grad(grad, Experts(deltas) if experts else deltas, base)


def check(actual, grad, base, deltas, experts):
    taus = task_vectors(base, deltas, experts)
    truth = torch.stack([(grad.double() * tau).sum() for tau in taus])
    scale = torch.stack([(grad.double() * tau).abs().sum() for tau in taus])
    differences = [d - base if experts else d for d in deltas]
    eager = torch.stack([(grad * tau.to(grad.dtype)).sum() for tau in differences])
    double = torch.float64 in (grad.dtype, deltas[0].dtype)
    assert actual.dtype == (torch.float64 if double else torch.float32)
    assert_no_worse_than_eager(actual, eager, truth, scale)


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_layouts(backend, size, layout, experts):
    grad, base, deltas = case(size, DTYPE_PAIRS[0], 3, experts, layout)
    check(compute(grad, base, deltas, experts), grad, base, deltas, experts)


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("count", [1, 8, 17])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes_and_counts(dtypes, count, experts):
    grad, base, deltas = case(1027, dtypes, count, experts)
    check(compute(grad, base, deltas, experts), grad, base, deltas, experts)


def test_sums_beyond_the_integers_of_fp32(backend):
    grad = torch.arange(-500, 501).float()
    deltas = [torch.full((1001,), 0.5), grad]
    expected = [0.0, float(sum(i * i for i in range(-500, 501)))]
    assert expected[1] > 2**24 and coefficient_grad(grad, deltas).tolist() == pytest.approx(
        expected, rel=2**-23, abs=0
    )


def test_long_sums_do_not_drift():
    """A running fp32 sum of a million ones times 1 + 2^-12 would lose the small part."""
    count = 1_000_000
    grad = torch.full((count,), 1 + 2.0**-12)
    with use_backend("native"):
        dot = coefficient_grad(grad, [torch.ones(count)])
    assert dot.item() == torch.tensor(count * (1 + 2.0**-12)).item()


def test_same_bytes_for_every_thread_count():
    grad, base, deltas = case(100_003, DTYPE_PAIRS[1], 3, True)
    assert_same_bytes_for_threads(lambda: (compute(grad, base, deltas, True),))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_only_their_row(backend, value):
    grad, base, deltas = case(100, DTYPE_PAIRS[0], 3, False)
    deltas[1][42] = value
    finite = torch.isfinite(compute(grad, base, deltas, False))
    assert finite.tolist() == [True, False, True]


def test_experts_need_their_base():
    with pytest.raises(ValueError, match="Experts need base"):
        coefficient_grad(torch.zeros(3), Experts([torch.zeros(3)]))


def test_is_not_differentiable():
    grad = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="coefficient_grad is not differentiable"):
        coefficient_grad(grad, [torch.ones(3)]).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grad_weight=torch.zeros(4)), r"deltas\[0\] has shape \[5\], expected \[4\]"),
        (dict(grad_weight=torch.zeros(5, dtype=int)), "grad_weight must be a floating-point"),
        (dict(deltas=[]), "deltas is empty"),
        (dict(deltas=Experts([torch.zeros(5)]), base=torch.zeros(4)), r"base is \[4\]"),
        (dict(deltas=[torch.zeros(5, device="meta")]), r"deltas\[0\] is on meta"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(RuntimeError, match=message):
        coefficient_grad(**(dict(grad_weight=torch.zeros(5), deltas=[torch.zeros(5)]) | change))
