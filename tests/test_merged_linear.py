"""`merged_linear`: values and gradients against a linear layer with a built weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmerge import Experts, use_backend
from fastmerge.ops import _panel, merged_linear, weighted_sum

from .samples import DTYPE_PAIRS, LAYOUTS, dtype_id, laid_out, make_deltas, random, task_vectors
from .tolerances import assert_no_worse_than_eager

OUT, IN, COUNT = 13, 9, 3


@pytest.fixture(params=[1 << 22, 3 * IN * 4, 1], ids=["one-panel", "3-row-panels", "1-row-panels"])
def panels(request, monkeypatch):
    """Run with the weight in one panel, in panels of a few rows, and in panels of one row."""
    monkeypatch.setattr(_panel, "CPU_PANEL_BYTES", request.param)


class Case:
    """Inputs, and the same computation with a built weight in the inputs' dtypes and in fp64.

    Args:
        lead: leading dimensions of x.
        dtypes: base's and deltas' dtypes; x and bias have base's.
        row_coefficients: one row of coefficients per row of x, or the leading dimensions of
            row coefficients, which broadcast to x's.
    """

    def __init__(
        self,
        lead=(6,),
        dtypes=DTYPE_PAIRS[0],
        *,
        experts=True,
        transpose=False,
        bias=True,
        row_coefficients=False,
        layout="contiguous",
        shape=(OUT, IN),
        count=COUNT,
    ):
        out, inner = shape
        self.experts, self.transpose = experts, transpose
        stored = (inner, out) if transpose else (out, inner)
        self.base = laid_out(random(stored, dtypes[0], seed=1), layout)
        self.deltas = make_deltas(self.base, count, dtypes[1], experts, layout)
        self.x = laid_out(random((*lead, inner), dtypes[0], seed=2), layout)
        self.bias = random(out, dtypes[0], seed=3) if bias else None
        exact = torch.float64 if dtypes[0] == torch.float64 else torch.float32
        own = lead if row_coefficients is True else row_coefficients or ()
        shape = (*own, count)
        self.coefficients = random(shape, exact, seed=4)
        self.grad = random((*lead, out), dtypes[0], seed=5)

    def fused(self, x, coefficients, bias):
        deltas = Experts(self.deltas) if self.experts else self.deltas
        return merged_linear(x, self.base, deltas, coefficients, bias, transpose=self.transpose)

    def built(self, x, coefficients, bias):
        """Built in the dtype of x, which is the dtype plain PyTorch would compute in."""
        base = self.base.to(x.dtype)
        total = base
        for k, delta in enumerate(self.deltas):
            tau = delta.to(x.dtype) - base if self.experts else delta.to(x.dtype)
            total = total + coefficients[..., k, None, None].to(x.dtype) * tau
        weight = total if self.transpose else total.mT  # [..., I, O]
        y = x @ weight if weight.dim() == 2 else (x.unsqueeze(-2) @ weight).squeeze(-2)
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
        taus = [t.abs() for t in task_vectors(self.base, self.deltas, self.experts)]
        lam, x, dy = (t.double().abs() for t in (self.coefficients, self.x, self.grad))
        size = self.base.double().abs()
        size = size + sum(lam[..., k, None, None] * tau for k, tau in enumerate(taus))
        size = size.mT if self.transpose else size  # [..., O, I]
        y = (size @ x.unsqueeze(-1)).squeeze(-1) + (0 if self.bias is None else 1)
        dx = (size.mT @ dy.unsqueeze(-1)).squeeze(-1)
        outer = dy.unsqueeze(-1) * x.unsqueeze(-2)  # [..., O, I], dW in x's dtype
        outer = outer.mT if self.transpose else outer
        dots = torch.stack([(outer * tau).sum((-1, -2)) for tau in taus], -1)
        leading = tuple(range(dy.dim() - 1))
        dots = dots.sum_to_size(lam.shape)
        return [y, dx, dots, dy.sum(leading) if leading else dy]

    def check(self):
        actual, eager = self.run(self.fused), self.run(self.built)
        truth = self.run(self.built, torch.float64)
        for name, found, plain, exact, scale in zip(
            ("y", "dx", "dcoefficients", "dbias"), actual, eager, truth, self.scales(), strict=True
        ):
            if exact is None:
                assert found is None
                continue
            try:
                assert_no_worse_than_eager(found, plain, exact, scale, dtype=self.x.dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_activations_of_any_rank(backend, panels, lead, bias, transpose):
    Case(lead, bias=bias, transpose=transpose).check()


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_dtypes(panels, dtypes, experts, transpose):
    Case((7,), dtypes, experts=experts, transpose=transpose).check()


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=str)
def test_row_coefficients(backend, lead, experts, transpose):
    Case(lead, experts=experts, transpose=transpose, row_coefficients=True).check()


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize(
    ("lead", "own"),
    [
        ((4, 3), (4, 1)),  # per sample
        ((4, 3), (1, 3)),
        ((4, 3), (3,)),
        ((4, 3), (1, 1)),
        ((5,), (1,)),
        ((2, 1, 3), (2, 1, 1)),
        ((0, 3), (0, 1)),
        ((0, 3), (1, 1)),
        ((4, 0), (4, 1)),
    ],
    ids=str,
)
def test_row_coefficients_broadcast(backend, lead, own, transpose):
    Case(lead, transpose=transpose, row_coefficients=own).check()


@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (4, 0), (31, 257)], ids=str)
@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
def test_shapes(backend, panels, shape, transpose):
    Case((3,), shape=shape, transpose=transpose).check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 17])
def test_layouts_and_counts(backend, layout, count):
    Case((4,), layout=layout, count=count).check()


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("own", [(), (2, 3), (2, 1), (1, 3)], ids=str)
def test_gradcheck(own, transpose):
    case = Case((2, 3), DTYPE_PAIRS[-1], row_coefficients=own, transpose=transpose, shape=(4, 3))
    inputs = [t.clone().requires_grad_() for t in (case.x, case.coefficients, case.bias)]
    assert torch.autograd.gradcheck(case.fused, inputs)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, 1)])
def test_only_the_gradients_asked_for(backend, panels, needed):
    case = Case()
    expected = case.run(case.fused)[1:]
    inputs = [
        t.clone().requires_grad_(bool(n))
        for t, n in zip((case.x, case.coefficients, case.bias), needed, strict=True)
    ]
    case.fused(*inputs).backward(case.grad)
    for tensor, gradient, wanted in zip(inputs, expected, needed, strict=True):
        if wanted:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_one_panel_equals_the_linear_layer_of_the_merged_weight(backend):
    case = Case((6,), DTYPE_PAIRS[1])
    weight = weighted_sum(case.base, Experts(case.deltas), case.coefficients)
    expected = F.linear(case.x, weight, case.bias)
    assert torch.equal(case.fused(case.x, case.coefficients, case.bias), expected)


def test_a_nan_weight_spoils_its_output_only(backend, panels):
    case = Case()
    case.deltas[0][4, 2] = float("nan")
    y = case.fused(case.x, case.coefficients, case.bias)
    assert y.isnan().any(0).nonzero().flatten().tolist() == [4]


def test_native_and_reference_gradients_agree():
    case = Case((50,), shape=(64, 48), count=8)
    results = []
    for name in ("native", "reference"):
        with use_backend(name):
            results.append(case.run(case.fused))
    for native, reference in zip(*results, strict=True):
        torch.testing.assert_close(native, reference)


@pytest.mark.parametrize("argument", ["base", "deltas"])
def test_weights_are_not_differentiable(argument):
    case = Case()
    (case.base if argument == "base" else case.deltas[1]).requires_grad_()
    with pytest.raises(RuntimeError, match=f"{argument} requires grad"):
        case.fused(case.x, case.coefficients, case.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 5)), r"x is \[2, 5\] on cpu, expected \[..., 3\]"),
        (dict(x=torch.zeros(())), r"x is \[\]"),
        (dict(x=torch.zeros(2, 3, dtype=int)), "x must be a floating-point tensor"),
        (dict(base=torch.zeros(3), deltas=[torch.zeros(3)] * 2), r"base has shape \[3\]"),
        (dict(coefficients=torch.zeros(3)), r"coefficients is \[3\] on cpu, expected \[2\]"),
        (dict(coefficients=torch.zeros(())), r"coefficients is \[\] on cpu, expected \[2\]"),
        (dict(coefficients=torch.zeros(1, 2, 2)), r"coefficients is \[1, 2, 2\].*\[2, 2\]"),
        (dict(coefficients=torch.zeros(2, dtype=int)), "coefficients must be a floating-point"),
        (dict(coefficients=torch.zeros(3, 2)), r"coefficients is \[3, 2\].*\[2\] or \[2, 2\]"),
        (dict(bias=torch.zeros(3)), r"bias is \[3\] on cpu, expected \[4\]"),
        (dict(deltas=[]), "deltas is empty"),
        (dict(x=torch.zeros(2, 3, device="meta")), "x is .* on meta"),
    ],
)
def test_errors_name_the_argument(change, message):
    good = dict(
        x=torch.zeros(2, 3),
        base=torch.zeros(4, 3),
        deltas=[torch.zeros(4, 3)] * 2,
        coefficients=torch.zeros(2),
    )
    with pytest.raises(RuntimeError, match=message):
        merged_linear(**(good | change))
