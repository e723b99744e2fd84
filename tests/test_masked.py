"""The format `Masked`: its views, and the ops on it against those on its task vectors."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from fastmerge import Dense, Masked, use_backend
from fastmerge.ops import (
    _panel,
    coefficient_grad,
    masked_coefficient_grad,
    masked_linear,
    masked_weighted_sum,
    merged_linear,
    weighted_sum,
)
from fastmerge.ops._bits import packed_shape, unpack_bits

from .samples import DTYPE_PAIRS, LAYOUTS, dtype_id, laid_out, random, raw
from .tolerances import assert_no_worse_than_eager

_masked_linear = importlib.import_module("fastmerge.ops.masked_linear")  # not the function

SHAPES = [(), (1,), (7,), (257,), (16,), (5, 7), (4, 16), (2, 8200), (0, 3), (3, 0), (4, 3, 2, 3)]


def masked(shape, count=3, dtype=torch.float32, layout="contiguous"):
    """Masked deltas and their masks [K, *]."""
    unified = laid_out(random(shape, dtype, 30), layout)
    bits = torch.stack([random(shape, torch.float32, 40 + k) > -0.4 for k in range(count)])
    return Masked.pack(unified, bits), bits


def dense(deltas, dtype=torch.float64):
    return Dense([t.contiguous() for t in deltas.task_vectors(deltas.unified, dtype)])


def same(found, unified, bits):
    assert torch.equal(found.unified, unified) and torch.equal(found.unpacked(), bits)
    size = found.unified.numel()
    assert found.masks.shape[1:] == packed_shape(unified.shape)
    columns = max(1, found.masks.shape[1])
    unused = unpack_bits(found.masks, found.masks.shape[2] * 8)[..., size // columns :]
    assert not unused.any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing(shape):
    deltas, bits = masked(shape)
    same(deltas, deltas.unified, bits)
    assert len(deltas) == 3
    taus = list(deltas.task_vectors(deltas.unified, torch.float64))
    assert torch.equal(torch.stack(taus), bits * deltas.unified.double())


@pytest.mark.parametrize("shape", [(100,), (16,), (10, 7), (10, 16), (10, 2, 3), (10, 2, 8)])
def test_views(shape):
    deltas, bits = masked(shape)
    for start, stop in ((0, shape[0]), (0, 8), (8, 10), (3, 7), (5, 5)):
        same(deltas.rows(start, stop), deltas.unified[start:stop], bits[:, start:stop])
    for index in (0, 3, shape[0] - 1, -1):
        same(deltas.entry(index), deltas.unified[index], bits[:, index])
    ids = torch.tensor([3, 3, 0, shape[0] - 1])
    same(deltas.gather(ids), deltas.unified[ids], bits[:, ids])
    if len(shape) > 1:
        same(deltas.flat(), deltas.unified.flatten(1), bits.flatten(2))


def test_rows_and_entries_of_matrices_share_memory():
    deltas, _ = masked((10, 7))
    address = deltas.masks.data_ptr()
    assert deltas.rows(3, 5).masks.data_ptr() == address + 3
    assert deltas.entry(4).masks.data_ptr() == address + 4
    vector, _ = masked((64,))
    assert vector.rows(16, 40).masks.data_ptr() == vector.masks.data_ptr() + 2


def test_one_bit_an_entry_for_each_task():
    deltas, _ = masked((96, 128), count=8)
    assert deltas.nbytes() == 96 * 128 * (4 + 8 / 8)


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"masks is torch.uint8 \[2, 5, 2\], expected .*K, 5, 1"):
        Masked(torch.zeros(5, 7), torch.zeros(2, 5, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"masks is torch.float32 \[2, 5\].*torch.bool \[K, \*\[5"):
        Masked.pack(torch.zeros(5), torch.zeros(2, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighted_sum_of_shapes(backend, shape, layout):
    check_sum(shape, DTYPE_PAIRS[0], 3, layout)


@pytest.mark.parametrize("count", [1, 8, 17])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_weighted_sum_of_dtypes(dtypes, count):
    check_sum((3, 331), dtypes, count, "contiguous")


def check_sum(shape, dtypes, count, layout):
    deltas, _ = masked(shape, count, dtypes[1], layout)
    base = laid_out(random(shape, dtypes[0], 1), layout)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    lam = random(count, wide, 2)
    found = weighted_sum(base, deltas, lam)
    assert found.dtype == base.dtype
    taus = dense(deltas, wide).tensors
    eager, truth, scale = base, base.double(), base.double().abs()
    for c, t in zip(lam, taus, strict=True):
        eager = eager + c.to(base.dtype) * t.to(base.dtype)
        truth, scale = truth + c.double() * t, scale + (c.double() * t).abs()
    assert_no_worse_than_eager(found, eager, truth, scale)
    # the same additions in the same order as for task vectors written out
    assert torch.equal(found, weighted_sum(base, Dense(taus), lam))
    grad = random(shape, dtypes[0], 3)
    dots = coefficient_grad(grad, deltas)
    products = [(grad.double() * t.double()) for t in taus]
    truth = torch.stack([p.sum() for p in products])
    scale = torch.stack([p.abs().sum() for p in products])
    eager = torch.stack([(grad * t.to(grad.dtype)).sum() for t in taus])
    assert_no_worse_than_eager(dots, eager, truth, scale)


def test_entries_of_no_mask_keep_their_bytes(backend):
    unified = torch.tensor([math.inf, math.nan, 1.0, 1.0])
    bits = torch.tensor([[False, False, True, False], [False, False, False, True]])
    base = torch.tensor([-0.0, 2.0, -0.0, -0.0])
    found = weighted_sum(base, Masked.pack(unified, bits), torch.tensor([0.5, 0.0]))
    assert found.tolist() == [0.0, 2.0, 0.5, 0.0]
    assert found.signbit().tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_another_result_dtype(backend, dtype):
    deltas, _ = masked((5, 7))
    base = random((5, 7), torch.bfloat16, 1)
    found = weighted_sum(base, deltas, torch.ones(3), dtype=dtype)
    assert torch.equal(found, weighted_sum(base.float(), deltas, torch.ones(3)).to(dtype))


def test_weighted_sum_gradcheck():
    deltas, _ = masked((5, 7), dtype=torch.float64)
    base = random((5, 7), torch.float64, 1)
    lam = random(3, torch.float64, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: weighted_sum(base, deltas, c), [lam])


class Linear:
    """Inputs of a masked linear layer, and the same computation with built weights."""

    def __init__(
        self,
        lead=(6,),
        coefficients=None,
        dtypes=DTYPE_PAIRS[0],
        *,
        transpose=False,
        bias=True,
        layout="contiguous",
        shape=(13, 9),
        count=3,
    ):
        out, inner = shape
        stored = (inner, out) if transpose else (out, inner)
        self.transpose = transpose
        self.deltas, _ = masked(stored, count, dtypes[1], layout)
        self.base = laid_out(random(stored, dtypes[0], 1), layout)
        self.x = laid_out(random((*lead, inner), dtypes[0], 2), layout)
        self.bias = random(out, dtypes[0], 3) if bias else None
        wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
        lam = random(count, wide, 4) if coefficients is None else coefficients
        self.coefficients = lam.to(wide)
        self.grad = random((*lead, out), dtypes[0], 5)

    def ours(self, x, coefficients, bias):
        return merged_linear(
            x, self.base, self.deltas, coefficients, bias, transpose=self.transpose
        )

    def built(self, x, coefficients, bias):
        """Built in the dtype of x; with row coefficients one product for each task vector."""
        coefficients, base = coefficients.to(x.dtype), self.base.to(x.dtype)
        taus = dense(self.deltas, x.dtype).tensors
        if coefficients.dim() == 1:
            weight = base
            for coefficient, tau in zip(coefficients, taus, strict=True):
                weight = weight + coefficient * tau
            y = x @ (weight if self.transpose else weight.t())
        else:
            y = x @ (base if self.transpose else base.t())
            for k, tau in enumerate(taus):
                y = y + coefficients[..., k : k + 1] * (x @ (tau if self.transpose else tau.t()))
        return y if bias is None else y + bias

    def run(self, call, dtype=None):
        """[y, dx, dcoefficients, dbias], with inputs converted to `dtype` if given."""
        inputs = [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
            for t in (self.x, self.coefficients, self.bias)
        ]
        y = call(*inputs)
        y.backward(self.grad.to(y.dtype))
        return [y.detach(), *(None if t is None else t.grad for t in inputs)]

    def scales(self):
        """Sums of the magnitudes that are added up in each of the results."""
        taus = [t.abs() for t in dense(self.deltas).tensors]
        x, dy = self.x.double().abs(), self.grad.double().abs()
        lam = self.coefficients.double().abs()
        size = self.base.double().abs()
        size = size + sum(lam[..., k, None, None] * tau for k, tau in enumerate(taus))
        size = size.mT if self.transpose else size  # [..., O, I]
        y = (size @ x.unsqueeze(-1)).squeeze(-1) + (0 if self.bias is None else 1)
        dx = (size.mT @ dy.unsqueeze(-1)).squeeze(-1)
        outer = dy.unsqueeze(-1) * x.unsqueeze(-2)
        outer = outer.mT if self.transpose else outer
        dots = torch.stack([(outer * tau).sum((-1, -2)) for tau in taus], -1)
        dots = dots.sum_to_size(self.coefficients.shape)
        return [y, dx, dots, dy.sum(tuple(range(dy.dim() - 1)))]

    def check(self):
        actual, eager = self.run(self.ours), self.run(self.built)
        truth = self.run(self.built, torch.float64)
        names = ("y", "dx", "dcoefficients", "dbias")
        for name, *values in zip(names, actual, eager, truth, self.scales(), strict=True):
            found, plain, exact, scale = values
            if exact is None:
                assert found is None
                continue
            try:
                assert_no_worse_than_eager(found, plain, exact, scale, dtype=self.x.dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def one_hot(*tasks, count=3, scale=0.7):
    """Row coefficients [B, K] that select a task for each sample."""
    rows = torch.nn.functional.one_hot(torch.tensor(tasks, dtype=torch.int64), count)
    return rows * torch.linspace(scale, 1.3, count)


@pytest.fixture(params=[1 << 22, 3 * 9 * 4, 1], ids=["one-panel", "3-row-panels", "1-row-panels"])
def panels(request, monkeypatch):
    """Run with the weight in one panel, in panels of a few rows, and in panels of one row."""
    monkeypatch.setattr(_panel, "CPU_PANEL_BYTES", request.param)


TRANSPOSE = pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])


@TRANSPOSE
@pytest.mark.parametrize("lead", [(1,), (6,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_one_row_of_coefficients(backend, panels, lead, bias, transpose):
    Linear(lead, bias=bias, transpose=transpose).check()


ROWS = {
    "sample": ((4, 5), one_hot(1, 0, 1, 2).unsqueeze(1)),
    "one-task": ((4, 5), one_hot(1, 1, 1, 1).unsqueeze(1)),
    "token": ((2, 3), random((2, 3, 3), torch.float32, 6)),
    "matrix": ((6,), one_hot(2, 0, 0, 1, 2, 0)),
    "position": ((4, 5), random((1, 5, 3), torch.float32, 6)),
    "shared": ((4, 5), random((1, 1, 3), torch.float32, 6)),
    "image": ((3, 2, 2), one_hot(2, 0, 2)[:, None, None]),
    "none": ((0, 5), one_hot().unsqueeze(1)),
    "zero": ((3, 4), torch.zeros(3, 1, 3)),
}


@TRANSPOSE
@pytest.mark.parametrize("rows", ROWS)
def test_row_coefficients(backend, panels, rows, transpose):
    Linear(*ROWS[rows], transpose=transpose).check()


@TRANSPOSE
@pytest.mark.parametrize("rows", [None, "sample"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes(dtypes, rows, transpose):
    Linear(*ROWS[rows] if rows else (), dtypes=dtypes, transpose=transpose).check()


@TRANSPOSE
@pytest.mark.parametrize("shape", [(1, 1), (31, 257), (64, 64), (5, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_shapes_and_layouts(backend, layout, shape, transpose):
    Linear(*ROWS["sample"], shape=shape, layout=layout, transpose=transpose).check()


@pytest.mark.parametrize("count", [1, 17])
def test_counts(backend, count):
    tasks = one_hot(0, count - 1, 0, 0, count=count).unsqueeze(1)
    Linear((4, 5), tasks, count=count).check()


@TRANSPOSE
@pytest.mark.parametrize("rows", [None, "sample", "position"])
def test_gradcheck(rows, transpose):
    lead, lam = ROWS[rows] if rows else ((2,), None)
    case = Linear(lead, lam, DTYPE_PAIRS[-1], transpose=transpose, shape=(4, 3))
    inputs = [t.clone().requires_grad_() for t in (case.x, case.coefficients, case.bias)]
    assert torch.autograd.gradcheck(case.ours, inputs)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, 1)])
@pytest.mark.parametrize("rows", [None, "sample"])
def test_only_the_gradients_asked_for(backend, rows, needed):
    case = Linear(*ROWS[rows] if rows else ())
    expected = case.run(case.ours)[1:]
    inputs = [
        t.clone().requires_grad_(bool(n))
        for t, n in zip((case.x, case.coefficients, case.bias), needed, strict=True)
    ]
    case.ours(*inputs).backward(case.grad)
    for tensor, gradient, wanted in zip(inputs, expected, needed, strict=True):
        if wanted:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_a_mixed_batch_equals_one_task_at_a_time(backend):
    lead, lam = ROWS["sample"]
    case = Linear(lead, lam, shape=(40, 24))
    mixed = case.ours(case.x, case.coefficients, case.bias)
    for x, row, y in zip(case.x, case.coefficients, mixed, strict=True):
        torch.testing.assert_close(y, case.ours(x, row[0], case.bias))
        torch.testing.assert_close(y, case.built(x, row[0], case.bias))


@TRANSPOSE
def test_more_rows_of_coefficients_than_are_worth_a_weight_each(monkeypatch, panels, transpose):
    """Groups and products with every task vector are two ways to the same numbers."""
    results = []
    for rows in (0, 1 << 20):
        monkeypatch.setattr(_masked_linear, "COMBINE_ROWS", rows)
        case = Linear(*ROWS["token"], transpose=transpose)
        case.check()
        with torch.no_grad():
            results.append(case.ours(case.x, case.coefficients, case.bias))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(5, 7), (33, 264), (3, 8201), (17000,)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
def test_native_equals_the_reference_byte_for_byte(dtypes, shape):
    deltas, _ = masked(shape, 9, dtypes[1])
    base, lam = random(shape, dtypes[0], 1), random(9, torch.float32, 2)
    results = []
    for name in ("native", "reference"):
        with use_backend(name):
            results.append(raw(weighted_sum(base, deltas, lam)))
    assert results[0] == results[1]


def good():
    deltas, _ = masked((4, 3), 2)
    return dict(
        x=torch.zeros(2, 3),
        base=torch.zeros(4, 3),
        unified=deltas.unified,
        masks=deltas.masks,
        coefficients=torch.zeros(2),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 5)), r"x is \[2, 5\] on cpu, expected \[..., 3\]"),
        (dict(x=torch.zeros(2, 3, dtype=int)), "x must be a floating-point tensor"),
        (dict(base=torch.zeros(4, 5)), r"unified is \[4, 3\] on cpu, expected \[4, 5\].* as base"),
        (dict(masks=torch.zeros(2, 4, 2, dtype=torch.uint8)), r"masks is .*\[2, 4, 2\].*K, 4, 1\]"),
        (dict(masks=torch.zeros(2, 4, 1)), "masks is torch.float32"),
        (dict(coefficients=torch.zeros(3)), r"coefficients is \[3\] on cpu, expected \[2\]"),
        (dict(coefficients=torch.zeros(3, 2)), r"coefficients is \[3, 2\].*\[2, 2\] or what broad"),
        (dict(coefficients=torch.zeros(1, 2, 2)), r"coefficients is \[1, 2, 2\]"),
        (dict(bias=torch.zeros(3)), r"bias is \[3\] on cpu, expected \[4\]"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(RuntimeError, match=f"masked_linear: {message}"):
        masked_linear(**(good() | change))


@pytest.mark.parametrize("argument", ["base", "unified"])
def test_weights_are_not_differentiable(argument):
    arguments = good() | {"coefficients": torch.zeros(2, requires_grad=True)}
    arguments[argument] = arguments[argument].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"masked_linear: {argument} requires grad"):
        masked_linear(**arguments)
    del arguments["x"]
    with pytest.raises(RuntimeError, match=f"masked_weighted_sum: {argument} requires grad"):
        masked_weighted_sum(**arguments)


def test_the_other_ops_name_their_arguments():
    arguments = good()
    with pytest.raises(RuntimeError, match=r"unified is \[4, 3\].*\[2, 3\].* as grad_weight"):
        masked_coefficient_grad(torch.zeros(2, 3), arguments["unified"], arguments["masks"])
    with pytest.raises(RuntimeError, match=r"masked_weighted_sum: coefficients has shape \[1\]"):
        masked_weighted_sum(
            arguments["base"], arguments["unified"], arguments["masks"], torch.ones(1)
        )
