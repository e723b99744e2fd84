"""`weighted_sum`: values, the list form, writing in place, gradients."""

from __future__ import annotations

import pytest
import torch

from fastmerge import Dense, Experts, use_backend
from fastmerge.ops import weighted_sum

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
    task_vectors,
)
from .tolerances import assert_no_worse_than_eager


def case(shape, dtypes, count, experts, layout="contiguous"):
    base = laid_out(random(shape, dtypes[0], seed=1), layout)
    deltas = make_deltas(base, count, dtypes[1], experts, layout)
    return base, deltas, random(count, torch.float32, seed=2)


def eager(base, deltas, coefficients, experts):
    total = base
    for coefficient, delta in zip(coefficients, deltas, strict=True):
        total = total + coefficient.to(base.dtype) * (delta - base if experts else delta)
    return total.to(base.dtype)


def check(actual, base, deltas, coefficients, experts):
    taus = task_vectors(base, deltas, experts)
    terms = [c * t for c, t in zip(coefficients.double(), taus, strict=True)]
    truth = base.double() + sum(terms)
    # subtracting loses up to half a unit of the larger operand, which counts as an addend
    scale = base.double().abs() + sum(
        c.abs() * (t.abs() + (base.double().abs() if experts else 0))
        for c, t in zip(coefficients.double(), taus, strict=True)
    )
    assert actual.dtype == base.dtype and actual.is_contiguous()
    plain = eager(base, deltas, coefficients, experts)
    assert_no_worse_than_eager(actual, plain, truth, scale)


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_layouts(backend, size, layout, experts):
    base, deltas, coefficients = case(size, (torch.float32, torch.float32), 3, experts, layout)
    format_ = Experts(deltas) if experts else deltas
    check(weighted_sum(base, format_, coefficients), base, deltas, coefficients, experts)


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("count", [1, 2, 8, 17])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes_and_counts(dtypes, count, experts):
    base, deltas, coefficients = case((13, 21), dtypes, count, experts)
    format_ = Experts(deltas) if experts else Dense(deltas)
    check(weighted_sum(base, format_, coefficients), base, deltas, coefficients, experts)


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
def test_native_equals_the_reference_bit_for_bit(dtypes, experts):
    base, deltas, coefficients = case(8209, dtypes, 11, experts)
    format_ = Experts(deltas) if experts else deltas
    with use_backend("native"):
        native = weighted_sum(base, format_, coefficients)
    with use_backend("reference"):
        reference = weighted_sum(base, format_, coefficients)
    assert raw(native) == raw(reference)


def test_same_bytes_for_every_thread_count():
    base, deltas, coefficients = case(100_003, (torch.bfloat16, torch.bfloat16), 3, True)
    assert_same_bytes_for_threads(lambda: (weighted_sum(base, Experts(deltas), coefficients),))


def test_a_zero_coefficient_returns_the_base(backend):
    base, deltas, _ = case(257, (torch.float16, torch.float16), 2, True)
    assert torch.equal(weighted_sum(base, Experts(deltas), torch.zeros(2)), base)


def test_one_expert_with_coefficient_one_is_that_expert(backend):
    base = torch.arange(-40, 41) / 8
    expert = torch.arange(81) / 16
    assert torch.equal(weighted_sum(base, Experts([expert]), torch.ones(1)), expert)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_they_are(backend, value):
    base, deltas, coefficients = case(20, (torch.float32, torch.float32), 2, False)
    deltas[1][7] = value
    out = weighted_sum(base, deltas, coefficients)
    assert not torch.isfinite(out[7]) and int(torch.isfinite(out).sum()) == 19


def test_lists_take_one_row_of_coefficients_per_tensor(backend):
    shapes = [(3, 5), (0,), (7,), ()]
    kinds = [(DTYPE_PAIRS[0], True), (DTYPE_PAIRS[1], True), (DTYPE_PAIRS[0], False)]
    kinds.append((DTYPE_PAIRS[3], True))
    cases = [case(s, d, 2, e) for s, (d, e) in zip(shapes, kinds, strict=True)]
    matrix = random((4, 2), torch.float32, seed=9)
    bases = [base for base, _, _ in cases]
    formats = [
        Experts(d) if e else Dense(d) for (_, d, _), (_, e) in zip(cases, kinds, strict=True)
    ]
    merged = weighted_sum(bases, formats, matrix)
    for out, base, deltas, row in zip(merged, bases, formats, matrix, strict=True):
        assert raw(out) == raw(weighted_sum(base, deltas, row))
    shared = weighted_sum(bases, formats, matrix[0])
    assert raw(shared[2]) == raw(weighted_sum(bases[2], formats[2], matrix[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_may_be_the_base(backend, layout):
    base, deltas, coefficients = case(300, DTYPE_PAIRS[0], 3, True, layout)
    expected = weighted_sum(base, Experts(deltas), coefficients)
    out = weighted_sum(base, Experts(deltas), coefficients, out=base)
    assert out is base and torch.equal(base, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_of_the_result(dtype):
    base, deltas, coefficients = case(33, DTYPE_PAIRS[0], 2, False)
    out = weighted_sum(base, deltas, coefficients, dtype=dtype)
    assert out.dtype == dtype
    assert torch.equal(out, weighted_sum(base, deltas, coefficients).to(dtype))


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
def test_gradient_is_autograd_s_through_the_built_weight(backend, experts):
    if backend == "native":
        pytest.skip("fp64 is computed by the reference")
    base, deltas, _ = case((4, 3), (torch.float64, torch.float64), 3, experts)
    coefficients = random(3, torch.float64, seed=4).requires_grad_()
    format_ = Experts(deltas) if experts else deltas
    assert torch.autograd.gradcheck(lambda c: weighted_sum(base, format_, c), (coefficients,))


def test_gradient_in_fp32_is_no_worse_than_autograd_s(backend):
    base, deltas, coefficients = case((61, 37), DTYPE_PAIRS[0], 5, True)
    grad = random((61, 37), torch.float32, seed=5)
    ours = coefficients.clone().requires_grad_()
    weighted_sum(base, Experts(deltas), ours).backward(grad)
    plain = coefficients.clone().requires_grad_()
    eager(base, deltas, plain, True).backward(grad)
    products = torch.stack([grad.double() * t for t in task_vectors(base, deltas, True)])
    reads = torch.stack([grad.double().abs() * (d.double().abs() + base.abs()) for d in deltas])
    assert_no_worse_than_eager(ours.grad, plain.grad, products.sum((1, 2)), scale=reads.sum((1, 2)))


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "mixed"])
def test_gradient_of_a_list_is_that_of_its_tensors(backend, alike):
    kinds = [(DTYPE_PAIRS[0], True), (DTYPE_PAIRS[1], alike), (DTYPE_PAIRS[0], True)]
    cases = [case(s, d, 3, e) for s, (d, e) in zip([(3, 5), (0,), (7,)], kinds, strict=True)]
    bases = [base for base, _, _ in cases]
    formats = [
        Experts(d) if e else Dense(d) for (_, d, _), (_, e) in zip(cases, kinds, strict=True)
    ]
    rows = random((3, 3), torch.float32, seed=9).requires_grad_()
    together = weighted_sum(bases, formats, rows)
    single = [weighted_sum(*one) for one in zip(bases, formats, rows, strict=True)]
    assert [raw(out) for out in together] == [raw(out) for out in single]
    grads = [random(tuple(b.shape), b.dtype, seed=11).requires_grad_() for b in bases]
    (found,) = torch.autograd.grad(together, rows, grads, create_graph=True)
    (expected,) = torch.autograd.grad(single, rows, grads)
    assert raw(found.detach()) == raw(expected) and expected[2].abs().min() > 0
    with pytest.raises(RuntimeError, match="not differentiable"):
        found.sum().backward()


def test_a_sum_that_is_not_used_leaves_its_row_without_gradient(backend):
    base, deltas, _ = case(9, DTYPE_PAIRS[0], 2, True)
    broken = [torch.full((9,), torch.nan), deltas[1]]
    rows = torch.ones(2, 2, requires_grad=True)
    _, used = weighted_sum([base, base], [Experts(broken), Experts(deltas)], rows)
    used.sum().backward()
    assert rows.grad[0].tolist() == [0, 0] and rows.grad[1].abs().min() > 0


@pytest.mark.parametrize("together", [False, True], ids=["single", "list"])
@pytest.mark.parametrize("argument", ["base", "deltas"])
def test_weights_are_not_differentiable(argument, together):
    base, deltas, coefficients = case(5, DTYPE_PAIRS[0], 2, False)
    (base if argument == "base" else deltas[1]).requires_grad_()
    coefficients.requires_grad_()
    with pytest.raises(RuntimeError, match=f"{argument} requires grad"):
        if together:
            weighted_sum([base], [deltas], coefficients)
        else:
            weighted_sum(base, deltas, coefficients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(deltas=[]), "deltas is empty"),
        (dict(deltas=[torch.zeros(4), torch.zeros(5)]), r"deltas\[0\] has shape \[4\].*\[5\]"),
        (dict(deltas=[torch.zeros(5), torch.zeros(5).half()]), r"deltas\[1\] is torch.float16"),
        (dict(deltas=[torch.zeros(5, dtype=int)] * 2), "must be a floating-point tensor"),
        (dict(base=torch.zeros(5, dtype=int)), "base must be a floating-point tensor"),
        (dict(coefficients=torch.zeros(3)), r"coefficients has shape \[3\], expected \[2\]"),
        (dict(deltas=[torch.zeros(5, device="meta")] * 2), r"deltas\[0\] is on meta"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(base=torch.zeros(5), deltas=[torch.zeros(5)] * 2, coefficients=torch.zeros(2))
    with pytest.raises(RuntimeError, match=message):
        weighted_sum(**(arguments | change))
