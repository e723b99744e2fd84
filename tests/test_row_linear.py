"""Row coefficients on the CPU: the grouped and the stacked strategy of `merged_linear`."""

from __future__ import annotations

import pytest
import torch

from fastmerge import _native, use_backend
from fastmerge.ops import _grouped, _stacked
from fastmerge.ops._strategy import use_strategy

from .samples import DTYPE_PAIRS, LAYOUTS, assert_same_bytes_for_threads, dtype_id
from .test_merged_linear import Case

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.unavailable_reason())


@pytest.fixture(params=["grouped", "stacked"], autouse=True)
def strategy(request):
    with use_backend("native"), use_strategy(request.param):
        yield request.param


@pytest.fixture(params=["fused", "one-panel", "small-panels", "small-batches"], autouse=True)
def panels(request, monkeypatch):
    """Run with tiles, with the weight in one panel, in panels of few entries, group by group."""
    monkeypatch.setattr(_grouped, "FUSED_ROWS", 128 if request.param == "fused" else 0)
    if request.param in ("fused", "one-panel"):
        return
    for module in (_grouped, _stacked):
        monkeypatch.setattr(module, "LEAST_ENTRIES", 3)
    small = 1 if request.param == "small-batches" else 300
    monkeypatch.setattr(_grouped, "BATCH_BYTES", small)
    monkeypatch.setattr(_grouped, "MULTIPLE", 1)
    monkeypatch.setattr(_stacked, "PANEL_BYTES", small)
    monkeypatch.setattr(_stacked, "MOST_ROWS", 4)


@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("shape", [(13, 9), (9, 13), (1, 1), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("own", [(4, 1), (4, 3)], ids=["sample", "token"])
def test_shapes(shape, own, transpose):
    Case((4, 3), row_coefficients=own, transpose=transpose, shape=shape).check()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("lead", "own"),
    [
        ((1, 3), (1, 1)),
        ((4, 1), (4, 1)),
        ((0, 3), (0, 1)),
        ((0, 3), (1, 3)),
        ((4, 0), (4, 1)),
        ((3, 4), (1, 4)),  # the rows of a group lie apart
        ((3, 4), (4,)),
        ((2, 3, 2), (2, 1, 2)),
        ((5,), (5,)),
    ],
    ids=str,
)
def test_leading_dimensions(lead, own, bias):
    Case(lead, row_coefficients=own, bias=bias).check()


@pytest.mark.parametrize("experts", [False, True], ids=["vectors", "experts"])
@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:-1], ids=dtype_id)
def test_dtypes(dtypes, transpose, experts):
    Case((3, 5), dtypes, row_coefficients=(3, 1), transpose=transpose, experts=experts).check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 17])
def test_layouts_and_counts(layout, count):
    Case((3, 2), layout=layout, count=count, row_coefficients=(3, 1)).check()


def onehot(ids):
    return torch.nn.functional.one_hot(torch.tensor(ids), 3).float().unsqueeze(1)


@pytest.mark.parametrize(
    "lam",
    [
        onehot([2, 0, 2, 1, 0]),
        onehot([0, 0, 0, 0, 2]),  # groups of unequal size, an expert nobody has
        torch.full((5, 1, 3), 0.3),
        torch.zeros(5, 1, 3),
    ],
    ids=["one-hot", "unequal", "equal", "zero"],
)
@pytest.mark.parametrize("transpose", [False, True], ids=["OI", "IO"])
def test_equal_coefficients(lam, transpose):
    case = Case((5, 2), row_coefficients=(5, 1), transpose=transpose)
    case.coefficients = lam
    case.check()


def test_a_batch_equals_its_samples(strategy):
    case = Case((5, 4), row_coefficients=(5, 1), shape=(40, 31))
    whole = case.fused(case.x, case.coefficients, case.bias)
    for i in range(5):
        alone = case.fused(case.x[i], case.coefficients[i, 0], case.bias)
        torch.testing.assert_close(whole[i], alone)


def test_nan_spoils_its_own_rows_and_outputs_only():
    case = Case((4, 2), row_coefficients=(4, 1))
    case.deltas[0][4, 2] = float("nan")
    case.coefficients[1:3] = float("nan")
    case.coefficients[3, 0, 0] = 0  # leaves the spoiled expert out
    y = case.fused(case.x, case.coefficients, case.bias)
    assert y[0].isnan().any(0).nonzero().flatten().tolist() == [4]
    assert y[1:3].isnan().all()


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["x", "coefficients"])
def test_only_the_gradients_asked_for(needed):
    case = Case((4, 3), row_coefficients=(4, 1))
    expected = case.run(case.fused)[1:3]
    inputs = [
        t.clone().requires_grad_(n)
        for t, n in zip((case.x, case.coefficients), needed, strict=True)
    ]
    case.fused(*inputs, case.bias).backward(case.grad)
    for tensor, gradient, wanted in zip(inputs, expected, needed, strict=True):
        assert tensor.grad is None or wanted
        if wanted:
            torch.testing.assert_close(tensor.grad, gradient)


def test_whole_numbers_are_exact_with_every_thread_count():
    case = Case((4, 3), row_coefficients=(4, 1), shape=(150, 130), bias=False)
    for tensor in (case.x, case.base, *case.deltas, case.grad, case.coefficients):
        tensor.copy_(tensor.mul(2).round())
    truth = case.run(case.built, torch.float64)[:3]

    def run():
        results = case.run(case.fused)[:3]
        for found, exact in zip(results, truth, strict=True):
            assert torch.equal(found.double(), exact)
        return results

    assert_same_bytes_for_threads(run)
