"""`lowrank_linear`: values and gradients against a linear layer with a built weight."""

from __future__ import annotations

import pytest
import torch

from fastmerge import Dense, LowRank, use_backend
from fastmerge.ops import _panel, coefficient_grad, lowrank_linear, merged_linear, weighted_sum
from fastmerge.ops import lowrank_linear as op_function

from .samples import (
    DTYPE_PAIRS,
    LAYOUTS,
    dtype_id,
    laid_out,
    random,
    raw,
)
from .tolerances import assert_no_worse_than_eager

OUT, IN = 13, 9
RANKS = (2, 0, 3)

# One row of coefficients a sample: other experts each, several, none, all equal, one for all.
MIXES = {
    "one-hot": [[1, 0, 0], [0, 0, 0.5], [0, 0, 2], [1, 0, 0]],
    "sorted": [[1, 0, 0], [1, 0, 0], [0, 0, 2], [0, 0, 2]],
    "several": [[1, 0, 0.5], [0, 0, 0], [0, 2, 0], [0, 0, -1]],
    "dense": [[1, 0.5, 2], [0.1, 0.2, 0.3], [-1, 1, 1], [0.5, 0.5, 0.5]],
    "nothing": [[0, 0, 0]] * 4,
}


class Case:
    """Inputs, and the same computation with built weights in the inputs' dtypes and in fp64.

    Args:
        lead: leading dimensions of x.
        dtypes: base's and factors' dtypes; x and bias have base's.
        coefficients: by default one row for all.
    """

    def __init__(
        self,
        lead=(6,),
        dtypes=DTYPE_PAIRS[0],
        *,
        coefficients=None,
        transpose=False,
        bias=True,
        layout="contiguous",
        shape=(OUT, IN),
        ranks=RANKS,
    ):
        out, inner = shape
        self.transpose, self.ranks = transpose, ranks
        stored = (inner, out) if transpose else (out, inner)
        total = sum(ranks)
        self.base = laid_out(random(stored, dtypes[0], seed=1), layout)
        self.down = laid_out(random((total, stored[1]), dtypes[1], seed=6), layout)
        self.up = laid_out(random((stored[0], total), dtypes[1], seed=7), layout)
        self.x = laid_out(random((*lead, inner), dtypes[0], seed=2), layout)
        self.bias = random(out, dtypes[0], seed=3) if bias else None
        exact = torch.float64 if dtypes[0] == torch.float64 else torch.float32
        lam = random(len(ranks), exact, seed=4) if coefficients is None else coefficients
        self.coefficients = lam.to(exact)
        self.grad = random((*lead, out), dtypes[0], seed=5)

    def fused(self, x, coefficients, bias):
        return lowrank_linear(
            x, self.base, self.down, self.up, self.ranks, coefficients, bias,
            transpose=self.transpose,
        )  # fmt: skip

    def taus(self, dtype):
        ranks = list(self.ranks)
        factors = zip(self.down.split(ranks), self.up.split(ranks, 1), strict=True)
        return [up.to(dtype) @ down.to(dtype) for down, up in factors]

    def built(self, x, coefficients, bias):
        total = self.base.to(x.dtype)
        for k, tau in enumerate(self.taus(x.dtype)):
            total = total + coefficients[..., k, None, None].to(x.dtype) * tau
        weight = total if self.transpose else total.mT  # [..., I, O]
        y = x @ weight if coefficients.dim() == 1 else (x.unsqueeze(-2) @ weight).squeeze(-2)
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
        parts = (self.down, self.up, self.base, self.coefficients, self.x, self.grad)
        down, up, size, lam, x, dy = (t.double().abs() for t in parts)
        ranks = list(self.ranks)
        factors = zip(down.split(ranks), up.split(ranks, 1), strict=True)
        taus = [high @ low for low, high in factors]
        size = size + sum(lam[..., k, None, None] * tau for k, tau in enumerate(taus))
        size = size.mT if self.transpose else size  # [..., O, I]
        y = (size @ x.unsqueeze(-1)).squeeze(-1) + (0 if self.bias is None else 1)
        dx = (size.mT @ dy.unsqueeze(-1)).squeeze(-1)
        outer = dy.unsqueeze(-1) * x.unsqueeze(-2)  # [..., O, I], dW in x's dtype
        outer = outer.mT if self.transpose else outer
        dots = torch.stack([(outer * tau).sum((-1, -2)) for tau in taus], -1)
        leading = tuple(range(dy.dim() - 1))
        return [y, dx, dots.sum_to_size(lam.shape), dy.sum(leading) if leading else dy]

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


@pytest.fixture(params=["reference", None])
def backend(request):
    if request.param is None:
        yield
        return
    with use_backend(request.param):
        yield


@pytest.fixture
def small_groups(monkeypatch):
    """Group rows even where a handful of them is not worth it."""
    module = __import__("sys").modules[op_function.__module__]
    monkeypatch.setattr(module, "MOVE_COST", 0)
    monkeypatch.setattr(module, "LEAST_ROWS", 0)


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3), (0,), (5, 40)], ids=str)
def test_activations_of_any_rank(backend, lead, transpose):
    Case(lead, transpose=transpose).check()


@pytest.mark.parametrize("panel", [1 << 22, 3 * IN * 4, 1])
@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
def test_one_row_of_coefficients_in_panels(panel, transpose, monkeypatch):
    monkeypatch.setattr(_panel, "CPU_PANEL_BYTES", panel)
    Case((50,), transpose=transpose, bias=transpose).check()
    Case((50,), transpose=transpose, ranks=(30, 9)).check()


@pytest.mark.parametrize("mix", [[0, 0, 0], [0.5, 0, 0], [1, 0, 2], [0, 3, 0]], ids=str)
@pytest.mark.parametrize("rows", [2, 50])
def test_experts_that_nobody_uses(rows, mix):
    case = Case((rows,), coefficients=torch.tensor(mix))
    case.check()
    for k, (start, stop) in enumerate(((0, 2), (2, 2), (2, 5))):
        if mix[k] == 0:
            case.down[start:stop] = float("nan")
    assert not case.fused(case.x, case.coefficients, case.bias).isnan().any()


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tokens", [None, 1, 5])
def test_samples_of_different_experts(small_groups, backend, tokens, mix, transpose):
    rows = torch.tensor(MIXES[mix])
    lead = (4,) if tokens is None else (4, tokens)
    lam = rows if tokens is None else rows.unsqueeze(1)
    Case(lead, coefficients=lam, transpose=transpose).check()


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5, 3), (4, 5, 3), (5, 3), (1, 3)], ids=str)
def test_coefficients_that_broadcast(small_groups, shape):
    lam = random(shape, torch.float32, seed=8)
    lam[lam < 0] = 0
    Case((4, 5), coefficients=lam).check()


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
@pytest.mark.parametrize("mix", [None, "one-hot", "several", "dense"])
def test_dtypes(small_groups, dtypes, mix):
    lam = None if mix is None else torch.tensor(MIXES[mix]).unsqueeze(1)
    Case((4, 7), dtypes, coefficients=lam).check()


@pytest.mark.parametrize("mix", [None, "one-hot", "several", "dense"])
def test_fp64_is_computed_in_fp64(small_groups, mix):
    lam = None if mix is None else torch.tensor(MIXES[mix]).unsqueeze(1)
    case = Case((4, 7), DTYPE_PAIRS[-1], coefficients=lam)
    for found, expected in zip(case.run(case.fused), case.run(case.built), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (4, 0), (31, 257)], ids=str)
@pytest.mark.parametrize("ranks", [(1,), (0,), (2,) * 17, (0, 5)], ids=str)
@pytest.mark.parametrize("rowwise", [False, True], ids=["one", "rows"])
def test_shapes_and_ranks(small_groups, backend, shape, ranks, rowwise):
    lam = random((3, len(ranks)), torch.float32, seed=8).clamp(min=0) if rowwise else None
    Case((3,), shape=shape, ranks=ranks, coefficients=lam).check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", [None, "one-hot"])
def test_layouts(small_groups, layout, mix):
    lam = None if mix is None else torch.tensor(MIXES[mix]).unsqueeze(1)
    Case((4, 3), layout=layout, coefficients=lam).check()


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("mix", [None, "one-hot", "dense"])
def test_gradcheck(small_groups, mix, transpose):
    lam = None if mix is None else torch.tensor(MIXES[mix]).unsqueeze(1)
    case = Case((4, 2), DTYPE_PAIRS[-1], coefficients=lam, transpose=transpose, shape=(4, 3))
    inputs = [t.clone().requires_grad_() for t in (case.x, case.coefficients, case.bias)]
    if mix == "one-hot":  # finite differences leave the pattern of zeros; gradients must not see it
        case.coefficients.requires_grad_(False)
        assert torch.autograd.gradcheck(case.fused, inputs, eps=1e-3, atol=1e-6)
        return
    assert torch.autograd.gradcheck(case.fused, inputs)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, 1)])
def test_only_the_gradients_asked_for(needed):
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


def test_a_sample_does_not_depend_on_its_batch(small_groups):
    """An expert that a sample does not use cannot reach it, not even by its NaN."""
    case = Case((4, 5), coefficients=torch.tensor(MIXES["one-hot"]).unsqueeze(1))
    case.down[2:] = float("nan")  # the third expert's
    y = case.fused(case.x, case.coefficients, case.bias)
    assert y.isnan().flatten(1).all(1).tolist() == [False, True, True, False]
    assert y.isnan().flatten(1).any(1).tolist() == [False, True, True, False]


def test_two_runs_give_the_same_bytes(small_groups):
    for mix in (None, "one-hot", "dense"):
        lam = None if mix is None else torch.tensor(MIXES[mix]).unsqueeze(1)
        case = Case((4, 50), coefficients=lam, shape=(40, 30), ranks=(4, 3, 5))
        first, second = case.run(case.fused), case.run(case.fused)
        assert [raw(t) for t in first] == [raw(t) for t in second]


@pytest.mark.parametrize("argument", ["base", "down", "up"])
def test_weights_are_not_differentiable(argument):
    case = Case()
    getattr(case, argument).requires_grad_()
    with pytest.raises(RuntimeError, match=f"{argument} requires grad"):
        case.fused(case.x, case.coefficients, case.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 5)), r"x is \[2, 5\] on cpu, expected \[..., 3\]"),
        (dict(x=torch.zeros(())), r"x is \[\]"),
        (dict(x=torch.zeros(2, 3, dtype=int)), "x must be a floating-point tensor"),
        (dict(base=torch.zeros(3)), r"base has shape \[3\]"),
        (dict(ranks=[]), r"ranks is \[\], expected K >= 1"),
        (dict(ranks=[3, -1]), r"ranks is \[3, -1\], expected K >= 1 ranks of at least 0"),
        (dict(ranks=[1, 2]), r"down is \[2, 3\] on cpu, expected \[3, 3\]"),
        (dict(up=torch.zeros(4, 3)), r"up is \[4, 3\] on cpu, expected \[4, 2\]"),
        (dict(coefficients=torch.zeros(3)), r"coefficients is \[3\] .*expected \[2\]"),
        (dict(coefficients=torch.zeros(3, 2)), r"coefficients is \[3, 2\].*\[2\] or \[2, 2\]"),
        (dict(bias=torch.zeros(3)), r"bias is \[3\] on cpu, expected \[4\]"),
        (dict(x=torch.zeros(2, 3, device="meta")), "x is .* on meta"),
    ],
)
def test_errors_name_the_argument(change, message):
    good = dict(
        x=torch.zeros(2, 3),
        base=torch.zeros(4, 3),
        down=torch.zeros(2, 3),
        up=torch.zeros(4, 2),
        ranks=[1, 1],
        coefficients=torch.zeros(2),
    )
    with pytest.raises(RuntimeError, match=message):
        lowrank_linear(**(good | change))


def deltas(shape, ranks=RANKS, dtype=torch.float32):
    down = [random((r, *shape[1:]), dtype, seed=10 + k) for k, r in enumerate(ranks)]
    up = [random((shape[0], r), dtype, seed=30 + k) for k, r in enumerate(ranks)]
    return LowRank(down, up)


def written_out(form, shape):
    return Dense(list(form.task_vectors(torch.empty(shape), torch.float64)))


@pytest.mark.parametrize("shape", [(5, 7), (6, 3, 2, 2)], ids=str)
def test_the_format_reads_as_its_products(shape):
    form, base, lam = deltas(shape), random(shape, torch.float32, 1), random(3, torch.float32, 2)
    dense = written_out(form, shape)
    assert len(form) == 3 and form.ranks == RANKS
    width = dense.tensors[0][0].numel()
    assert form.nbytes() == 4 * 5 * (shape[0] + width)
    ids = torch.tensor([4, 0, 4])
    views = {
        "rows": (form.rows(1, 4), dense.rows(1, 4), base[1:4]),
        "none": (form.rows(2, 2), dense.rows(2, 2), base[2:2]),
        "entry": (form.entry(2), dense.entry(2), base[2]),
        "gather": (form.gather(ids), dense.gather(ids), base[ids]),
        "flat": (form.flat(), dense.flat(), base.flatten(1)),
    }
    for name, (found, expected, rows) in views.items():
        for a, b in zip(found.task_vectors(rows, torch.float32), expected.tensors, strict=True):
            torch.testing.assert_close(a, b.float(), msg=name)
    assert form.rows(1, 4).up.data_ptr() == form.up[1:].data_ptr()
    lam.requires_grad_()
    merged = weighted_sum(base, form, lam)
    truth = weighted_sum(base.double(), dense, lam.detach().double())
    torch.testing.assert_close(merged, truth.float())
    grad = random(shape, torch.float32, 3)
    expected = coefficient_grad(grad.double(), dense).float()
    torch.testing.assert_close(coefficient_grad(grad, form), expected)
    merged.backward(grad)
    torch.testing.assert_close(lam.grad, expected)
    outs = weighted_sum([base], [form], lam[None].detach(), out=[torch.empty(shape)])
    assert torch.equal(outs[0], merged)


def test_merged_linear_takes_the_format():
    case = Case((4, 5), coefficients=torch.tensor(MIXES["several"]).unsqueeze(1))
    ranks = list(case.ranks)
    form = LowRank(case.down.split(ranks), case.up.split(ranks, 1))
    found = merged_linear(case.x, case.base, form, case.coefficients, case.bias)
    assert torch.equal(found, case.fused(case.x, case.coefficients, case.bias))


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ([], [], "0 down and 0 up factors"),
        ([torch.zeros(2, 3)], [], "1 down and 0 up"),
        ([torch.zeros(2, 3)], [torch.zeros(4, 3)], r"up\[0\] \[4, 3\], expected .*\[4, 2\]"),
        ([torch.zeros(3)], [torch.zeros(4)], r"down\[0\] is \[3\]"),
        (
            [torch.zeros(2, 3), torch.zeros(2, 5)],
            [torch.zeros(4, 2)] * 2,
            r"down\[1\] is \[2, 5\].*expected \[rank, 3\]",
        ),
        (
            [torch.zeros(1, 3), torch.zeros(1, 3).half()],
            [torch.zeros(4, 1)] * 2,
            r"down\[1\] is torch.float16 on cpu, expected torch.float32",
        ),
        ([torch.zeros(1, 3, requires_grad=True)], [torch.zeros(4, 1)], "does not require grad"),
    ],
)
def test_factors_that_do_not_fit_are_named(down, up, message):
    with pytest.raises(ValueError, match=message):
        LowRank(down, up)


def test_the_format_names_what_does_not_fit_it():
    with pytest.raises(RuntimeError, match=r"base is \[5, 6\].*expected \[5, 7\]"):
        weighted_sum(torch.zeros(5, 6), deltas((5, 7)), torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"grad_weight is \[4, 7\].*expected \[5, 7\]"):
        coefficient_grad(torch.zeros(4, 7), deltas((5, 7)))
