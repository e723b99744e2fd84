"""The ops on the CUDA kernels: results of the CPU kernels; streams and graphs on a device."""

from __future__ import annotations

import pytest
import torch

import fastmerge
import fastmerge.ops
from fastmerge import _native
from fastmerge._native import cpu, cuda
from fastmerge.ops._bits import pack_rows

from .test_cuda_kernels import Case, random_tensor, run_streaming, same_bytes

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.unavailable_reason())

ops = torch.ops.fastmerge


def run_ops(device: torch.device | str) -> list[torch.Tensor]:
    case = Case(120 * 70, 5, torch.bfloat16, torch.bfloat16).on(device)
    base = case.base.view(120, 70)
    # Transposed deltas are not contiguous.
    deltas = [d.view(70, 120).t() for d in case.deltas]
    grad = case.grad.view(120, 70)
    experts = torch.stack([d + base for d in deltas]).unbind()
    results = [
        ops.weighted_sum(base, deltas, case.coefficients, False, torch.float16),
        ops.weighted_sum(base, experts, case.coefficients.double().float(), True, None),
        ops.coefficient_grad(grad, experts, base),
        *ops.combine_and_dot(base, deltas, case.coefficients, grad, False, None),
        ops.magnitude_histogram(deltas[0], base, 0, 0, False),
        fastmerge.ops.magnitude_threshold(deltas[:2], density=0.3),
        fastmerge.ops.magnitude_threshold(deltas[0], density=0.3, base=base),
        fastmerge.ops.ties_merge(deltas, density=0.4, base=base, scaling=0.3),
        fastmerge.ops.ties_masks(deltas, density=0.4),
        *fastmerge.ops.elect(deltas),
    ]
    found = fastmerge.ops.elect(deltas)
    results += [
        ops.masked_weighted_sum(base, found.unified, found.masks, case.coefficients, torch.float32),
        ops.masked_coefficient_grad(grad, found.unified, found.masks),
    ]
    outs = [torch.empty_like(base) for _ in range(3)]
    fastmerge.ops.weighted_sum([base] * 3, [deltas] * 3, case.coefficients, out=outs)
    return [*results, *outs]


def test_ops_give_the_cpu_kernels_bytes(device, on_cpu) -> None:
    for found, expected in zip(run_ops(device), on_cpu(run_ops, "cpu"), strict=True):
        assert found.device.type == device.type
        same_bytes(found, expected)


def run_linear(device, rows: int, transpose: bool, masked: bool) -> list[torch.Tensor]:
    x = random_tensor(rows * 96, torch.float32, 1).view(rows, 96)
    shape = (96, 200) if transpose else (200, 96)
    base, *deltas = (random_tensor(200 * 96, torch.float32, 2 + i).view(shape) for i in range(5))
    leaves = [x.to(device).requires_grad_(), torch.full((4,), 0.3, device=device).requires_grad_()]
    deltas = [d.to(device) for d in deltas]
    layer = leaves[0], base.to(device)
    if masked:
        bits = pack_rows(torch.stack([d > 0 for d in deltas]))
        y = ops.masked_linear(*layer, deltas[0], bits, leaves[1], None, transpose)
    else:
        y = ops.merged_linear(*layer, deltas, leaves[1], None, False, transpose)
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("masked", [False, True], ids=["merged", "masked"])
@pytest.mark.parametrize("transpose", [False, True])
def test_panels_of_linear_layers(device, on_cpu, transpose: bool, masked: bool) -> None:
    with fastmerge.use_backend("native"):
        found = run_linear(device, 33, transpose, masked)
        expected = on_cpu(run_linear, "cpu", 33, transpose, masked)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.cpu(), e, rtol=1e-4, atol=1e-3)


def test_errors_name_the_argument(device) -> None:
    base = torch.zeros(4, device=device)
    with pytest.raises(RuntimeError, match=r"deltas\[0\] is on meta, expected"):
        ops.weighted_sum(base, [torch.zeros(4, device="meta")], base[:1], False, None)
    with pytest.raises(ValueError, match="deltas: the CUDA kernels take at most 256"):
        ops.weighted_sum(base, [base] * 257, torch.zeros(257, device=device), False, None)
    with (
        fastmerge.use_backend("native"),
        pytest.raises(RuntimeError, match=r"dtype torch\.float64"),
    ):
        ops.weighted_sum(base.double(), [base.double()], base[:1], False, None)


def test_work_runs_on_the_current_stream(cuda_device) -> None:
    case = Case(1 << 20, 8, torch.bfloat16, torch.bfloat16)
    moved = case.on(cuda_device)
    stream = torch.cuda.Stream(cuda_device)
    stream.wait_stream(torch.cuda.current_stream(cuda_device))
    with torch.cuda.stream(stream):
        # Memory and code are there before anything is timed.
        run_streaming(cuda, moved, torch.bfloat16, True, cuda_device)
        torch.cuda._sleep(50_000_000)  # work on another stream would be done long before this
        moved.base.neg_()
        found = run_streaming(cuda, moved, torch.bfloat16, True, cuda_device)
        busy = not stream.query()
    assert busy, "a launch waited for the device"
    stream.synchronize()
    case.base.neg_()
    expected = run_streaming(cpu, case, torch.bfloat16, True, "cpu")
    for f, e in zip(found, expected, strict=True):
        same_bytes(f, e)


def test_graph_capture_and_replay(cuda_device) -> None:
    count = 40  # more than one table of tensors
    cases = [Case(9001 + 8 * i, 8, torch.bfloat16, torch.bfloat16, seed=i) for i in range(count)]
    moved = [case.on(cuda_device) for case in cases]
    thresholds = torch.full((8,), 0.5, device=cuda_device)
    outs = [torch.empty_like(case.base) for case in moved]
    merged = torch.empty_like(moved[0].base)
    coefficients = torch.stack([case.coefficients for case in moved])
    bases, deltas = [c.base for c in moved], [c.deltas for c in moved]
    grads = [c.grad for c in moved]

    def work():
        cuda.weighted_sum(bases, deltas, coefficients, outs, True)
        return (
            cuda.coefficient_grad(grads, bases, deltas),
            cuda.ties_merge(bases[0], deltas[0], thresholds, merged, experts=True, add_base=True),
            cuda.magnitude_threshold(deltas[0], bases[:1] * 8, 700),
            fastmerge.ops.ties_merge(deltas[0], density=0.4, base=bases[0]),
            fastmerge.ops.ties_masks(deltas[0], thresholds=thresholds),
        )

    work()
    torch.cuda.synchronize(cuda_device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for tensor in (*bases, coefficients):
        tensor.mul_(0.5)
    for tensor in (*outs, merged):
        tensor.fill_(float("nan"))
    graph.replay()
    replayed = [t.clone() for t in (*captured, *outs, merged)]
    direct = [*work(), *outs, merged]
    for f, e in zip(replayed, direct, strict=True):
        same_bytes(f, e)


def test_a_device_that_is_not_current(cuda_device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    case = Case(5000, 3, torch.float32, torch.float32)
    expected = run_streaming(cpu, case, torch.float32, True, "cpu")
    other = torch.device("cuda", 1)
    found = run_streaming(cuda, case.on(other), torch.float32, True, other)
    assert torch.cuda.current_device() == 0
    for f, e in zip(found, expected, strict=True):
        same_bytes(f, e)


@pytest.mark.slow
def test_more_entries_than_32_bits_count(cuda_device) -> None:
    size = (1 << 32) + 8
    base = torch.zeros(size, dtype=torch.bfloat16, device=cuda_device)
    delta = torch.ones(size, dtype=torch.bfloat16, device=cuda_device)
    one = torch.ones(1, 1, device=cuda_device)
    cuda.weighted_sum([base], [[delta]], one, [base])
    assert base[-8:].eq(1).all() and base[:8].eq(1).all() and base.sum(dtype=torch.float64) == size
    assert cuda.coefficient_grad([base], None, [[delta]]).item() == size
    counts = torch.zeros(65536, dtype=torch.int64, device=cuda_device)
    cuda.magnitude_histogram(None, delta, 0, 0, counts)
    assert counts.sum().item() == counts[127 << 8].item() == size
