"""What the ops refuse on a GPU and how they say it, without one: fake tensors on fake devices."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastmerge import ops

SIDE, COUNT = 16, 2


def arguments(mode) -> dict[str, torch.Tensor]:
    with mode:
        named = {name: torch.empty(SIDE, SIDE, device="cuda") for name in ("x", "base", "grad")}
        named |= {f"delta{k}": torch.empty(SIDE, SIDE, device="cuda") for k in range(COUNT)}
        return named | {"lam": torch.empty(COUNT, device="cuda")}


def call(op: str, a: dict[str, torch.Tensor]) -> object:
    deltas = [a[f"delta{k}"] for k in range(COUNT)]
    return {
        "weighted_sum": lambda: ops.weighted_sum(a["base"], deltas, a["lam"]),
        "coefficient_grad": lambda: ops.coefficient_grad(a["grad"], deltas),
        "combine_and_dot": lambda: ops.combine_and_dot(a["base"], deltas, a["lam"], a["grad"]),
        "merged_linear": lambda: ops.merged_linear(a["x"], a["base"], deltas, a["lam"]),
        "ties_merge": lambda: ops.ties_merge(
            deltas, thresholds=a["lam"], base=a["base"], majority=0
        ),
        "ties_masks": lambda: ops.ties_masks(deltas, thresholds=a["lam"], majority=0),
        "softmax_entropy": lambda: ops.softmax_entropy(a["x"]),
    }[op]()


ELSEWHERE = {
    "weighted_sum": ("delta1", r"deltas\[1\] is on cuda:1, expected cuda:0 as base"),
    "coefficient_grad": ("delta1", r"deltas\[1\] is on cuda:1, expected cuda:0"),
    "combine_and_dot": ("grad", r"grad_weight is .* on cuda:1, expected .* on cuda:0 as base"),
    "merged_linear": ("lam", r"cuda:1.*cuda:0"),
    "ties_merge": ("lam", r"thresholds is \[2\] on cuda:1, expected \[2\] on cuda:0"),
    "ties_masks": ("delta1", r"deltas\[1\] is on cuda:1, expected cuda:0"),
}


@pytest.mark.parametrize("op", ELSEWHERE)
def test_mismatched_devices(op):
    mode = FakeTensorMode()
    named = arguments(mode)
    with mode:
        call(op, named)
        name, message = ELSEWHERE[op]
        named[name] = torch.empty(named[name].shape, device="cuda:1")
        with pytest.raises(RuntimeError, match=f"(?s){op}.*{message}"):
            call(op, named)


@pytest.mark.parametrize("op", [*ELSEWHERE, "softmax_entropy"])
def test_unsupported_dtype(op):
    mode = FakeTensorMode()
    named = arguments(mode)
    with mode:
        for name in ("x", "grad", "delta0", "delta1"):
            named[name] = torch.empty(SIDE, SIDE, device="cuda", dtype=torch.int8)
        with pytest.raises(RuntimeError, match=f"{op}.*floating-point.*int8"):
            call(op, named)


def test_ops_without_a_cuda_kernel_say_so_where_native_is_forced(monkeypatch):
    from fastmerge import _native, backends

    monkeypatch.setattr(_native, "for_device", lambda device: (_native.cuda, ""))
    values = arguments(FakeTensorMode())["x"]
    for op in ("magnitude_masks", "random_masks", "masked_merge", "row_gram", "task_variance"):
        assert backends.native_kernels(op, values) is None
        with backends.use_backend("native"):
            with pytest.raises(RuntimeError, match=f"{op}: the native .* it has no cuda kernel"):
                backends.native_kernels(op, values)
    assert backends.native_kernels("weighted_sum", values) is _native.cuda
