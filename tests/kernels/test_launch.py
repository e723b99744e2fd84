"""The launchers' own calls, down to the compiled kernel: all of a launch but the GPU.

A stand-in for the driver names the target, and each call stops where it would load the code.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from fastmerge import _native, kernels, ops, use_backend
from fastmerge.kernels import launching
from fastmerge.ops._bits import pack_rows

from . import cases, offline

pytestmark = [
    pytest.mark.skipif(launching.INTERPRETED, reason="kernels loaded for the interpreter"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the value tests run on the GPU"),
]


@pytest.fixture(params=[80, 90], ids=lambda target: f"sm_{target}")
def compiled(request, monkeypatch):
    """Launch on CPU tensors as if they were on the target; collects what was compiled."""
    found, run = [], JITFunction.run
    stand_in = SimpleNamespace(
        get_current_device=lambda: f"stand-in sm_{request.param}",
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", request.param, 32),
    )

    def compile_only(self, *arguments, grid, warmup, **options):
        found.append(run(self, *arguments, grid=grid, warmup=True, **options))

    monkeypatch.setattr(driver, "_active", stand_in)
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launching, "INTERPRETED", True)
    limits = request.param // 10, cases.SHARED_MEMORY[request.param]
    monkeypatch.setattr(launching, "INTERPRETED_LIMITS", limits)
    return found


def check(compiled, launches):
    assert len(compiled) == launches
    for kernel in compiled:
        read = offline.read(kernel)
        limit = launching.INTERPRETED_LIMITS[1]
        assert read["spilled"] == 0 and read["shared"] <= limit, (kernel.name, read)


@pytest.mark.parametrize(
    "sizes, count",
    [((100, 256, 128), 32), ((9, 127, 65), 16), ((200, 127, 65), 16)],
    ids=["aligned", "few odd rows", "many odd rows"],
)
def test_merged_linear(compiled, sizes, count):
    rows, inner, outer = sizes
    base, *deltas = torch.randn(count + 1, outer, inner, dtype=torch.bfloat16)
    x, dy = torch.randn(rows, inner).bfloat16(), torch.randn(rows, outer).bfloat16()
    lam, bias = torch.randn(count), torch.randn(outer)
    y = kernels.merged_linear_forward(x, base, deltas, lam, bias, True, False)
    dx = kernels.merged_linear_backward_x(dy, base, deltas, lam, False, False)
    assert y.shape == dy.shape and dx.shape == x.shape
    check(compiled, 2)


def test_split_merged_linear(compiled):
    base, *deltas = torch.randn(3, 64, 1024, dtype=torch.float16)
    x, bias = torch.randn(2, 1024).half(), torch.randn(64).half()
    kernels.merged_linear_forward(x, base, deltas, torch.randn(2), bias, True, False)
    check(compiled, 2)


@pytest.mark.parametrize("sizes", [(64, 256, 128), (33, 127, 65)], ids=["aligned", "odd"])
def test_coefficient_grad(compiled, sizes):
    rows, inner, outer = sizes
    base, *deltas = torch.randn(9, outer, inner, dtype=torch.bfloat16)
    x, dy = torch.randn(rows, inner).bfloat16(), torch.randn(rows, outer).bfloat16()
    grad = kernels.linear_coefficient_grad(dy, x, base, deltas, False)
    assert grad.shape == (8,)
    kernels.linear_coefficient_grad(dy, x, None, deltas, False)
    check(compiled, 4)


@pytest.mark.parametrize("sizes", [(64, 256, 128), (33, 127, 65)], ids=["aligned", "odd"])
def test_row_linear(compiled, sizes):
    rows, inner, outer = sizes
    base, *deltas = torch.randn(4, outer, inner, dtype=torch.bfloat16)
    x, dy = torch.randn(rows, inner).bfloat16(), torch.randn(rows, outer).bfloat16()
    lam = torch.randn(rows, 3)
    kernels.row_linear_forward(x, base, deltas, lam, None, True, False)
    dx, grad = kernels.row_linear_backward(dy, x, base, deltas, lam, True, False)
    assert dx.shape == x.shape and grad.shape == lam.shape
    check(compiled, 3)


@pytest.mark.parametrize("sizes", [(640, 256, 128), (33, 127, 65)], ids=["aligned", "odd"])
def test_masked_linear(compiled, sizes):
    rows, inner, outer = sizes
    base, unified = torch.randn(2, outer, inner, dtype=torch.bfloat16)
    x, dy = torch.randn(rows, inner).bfloat16(), torch.randn(rows, outer).bfloat16()
    lam, masks = torch.eye(3)[torch.arange(rows) % 3], pack_rows(torch.rand(3, outer, inner) < 0.5)
    y = kernels.masked_linear_forward(x, base, unified, masks, lam, None, False)
    dx, grad = kernels.masked_linear_backward(dy, x, base, unified, masks, lam, False)
    assert y.shape == dy.shape and dx.shape == x.shape and grad.shape == lam.shape
    kernels.linear_masked_coefficient_grad(dy, x, unified, masks, False)
    check(compiled, 7)


def test_lowrank_linear(compiled):
    """Ranks are arguments: other ones of the same sum need no kernel of their own."""
    x, base, down, up = (torch.randn(*shape) for shape in ((9, 32), (48, 32), (16, 32), (48, 16)))
    for ranks in ([1, 2, 13], [16, 0, 0]):
        kernels.lowrank_linear_forward(x, base, down, up, ranks, torch.rand(9, 3), None)
    check(compiled, 4)
    assert compiled[0] is compiled[2] and compiled[1] is compiled[3]


READS = ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@pytest.mark.parametrize("name", ["merged", "masked", "lowrank"])
def test_rows_of_their_own_wait_for_nothing(compiled, monkeypatch, name):
    """The host never reads what is on the device: neither coefficients nor what follows from
    them."""
    base, *deltas = torch.randn(4, 48, 32)
    x, lam = torch.randn(6, 5, 32, requires_grad=True), torch.randn(6, 1, 3, requires_grad=True)
    masks = pack_rows(torch.rand(3, 48, 32) < 0.5)
    down, up = torch.randn(6, 32), torch.randn(48, 6)
    layers = {
        "merged": lambda: ops.merged_linear(x, base, deltas, lam),
        "masked": lambda: ops.masked_linear(x, base, deltas[0], masks, lam),
        "lowrank": lambda: ops.lowrank_linear(x, base, down, up, [1, 2, 3], lam),
    }

    def read(*arguments):
        raise AssertionError("the host reads a tensor")

    with monkeypatch.context() as patch:
        for method in READS:
            patch.setattr(torch.Tensor, method, read)
        with use_backend("triton"):
            layers[name]().backward(torch.randn(6, 5, 48))
        count = len(compiled)
        if _native.available():  # on a CPU, whose values are there
            with use_backend("native"), pytest.raises(AssertionError, match="the host reads"):
                layers[name]()
    assert x.grad.shape == x.shape and lam.grad.shape == lam.shape
    assert len(compiled) == count > 0


@pytest.mark.parametrize("sizes", [(50, 256, 16), (9, 65, 5)], ids=["aligned", "odd"])
def test_residual_adapter(compiled, sizes):
    rows, width, rank = sizes
    x, down = torch.randn(2, rows, width).bfloat16(), torch.randn(3, rank, width).bfloat16()
    up, tasks = torch.randn(3, width, rank).bfloat16(), torch.tensor([2, 0])
    assert kernels.residual_adapter_forward(x, down, up, tasks).shape == x.shape
    check(compiled, 1)


def test_softmax_entropy(compiled):
    logits = torch.randn(5, 1003).bfloat16()
    entropy, normalizer = kernels.softmax_entropy_forward(logits)
    slope = kernels.softmax_entropy_backward(torch.randn(5), logits, entropy, normalizer)
    assert slope.shape == logits.shape
    check(compiled, 2)
