"""The CUDA kernels against the CPU kernels, byte for byte, on a device or emulated."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastmerge import _native
from fastmerge._native import cpu, cuda, extensions
from fastmerge.ops._bits import mask_rows, pack_bits, packed_shape

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.unavailable_reason())

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 7, 8, 16, 511, 512, 768, 8191, 8192, 8200, 40001, 65536]
COUNTS = [1, 2, 7, 8, 9, 16, 32, 33]
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 6e-8, -65504.0, 1e-40]


def random_tensor(size: int, dtype: torch.dtype, seed: int, offset: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size + offset, generator=generator).to(dtype)[offset:]


def poisoned(size: int, dtype: torch.dtype, device, offset: int = 0) -> torch.Tensor:
    return torch.full((size + offset,), float("nan"), dtype=dtype, device=device)[offset:]


def to(device, tensors, offset: int = 0):
    """Copies on a device, each `offset` elements into its memory."""
    moved = []
    for tensor in tensors:
        room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
        room[offset:].copy_(tensor.flatten())
        moved.append(room[offset:])
    return moved


def same_bytes(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    left, right = (t.cpu().contiguous().view(-1).view(torch.uint8) for t in (found, expected))
    wrong = (left != right).nonzero().flatten()
    assert wrong.numel() == 0, f"{wrong.numel()} bytes differ, the first is {wrong[0].item()}"


class Case:
    """Base, deltas, coefficients and gradient of one tensor."""

    def __init__(self, size, count, base_dtype, delta_dtype, grad_dtype=torch.float32, seed=0):
        self.base = random_tensor(size, base_dtype, seed)
        self.deltas = [random_tensor(size, delta_dtype, seed + 1 + k) for k in range(count)]
        self.coefficients = random_tensor(count, torch.float32, seed + 300)
        self.grad = random_tensor(size, grad_dtype, seed + 301)

    def on(self, device, offset: int = 0) -> Case:
        moved = Case.__new__(Case)
        (moved.base,) = to(device, [self.base], offset)
        moved.deltas = to(device, self.deltas, offset)
        moved.coefficients = self.coefficients.to(device)
        (moved.grad,) = to(device, [self.grad], offset)
        return moved


def run_streaming(kernels, case, out_dtype, experts, device, offset=0):
    size = case.base.numel()
    out, fused = (poisoned(size, out_dtype, device, offset) for _ in range(2))
    kernels.weighted_sum([case.base], [case.deltas], case.coefficients[None], [out], experts)
    bases = [case.base] if experts else None
    dots = kernels.coefficient_grad([case.grad], bases, [case.deltas])
    fused_dots = kernels.combine_and_dot(
        case.base, case.deltas, case.coefficients, case.grad, fused, experts
    )
    return out, dots[0], fused, fused_dots


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_streaming(device, size: int, experts: bool) -> None:
    for index, count in enumerate(COUNTS):
        if size > 8200 and count > 9:
            continue
        dtype, offset = DTYPES[(index + size) % 3], index % 2
        case = Case(size, count, dtype, dtype)
        expected = run_streaming(cpu, case, dtype, experts, "cpu")
        moved = case.on(device, offset)
        found = run_streaming(cuda, moved, dtype, experts, device, offset)
        for f, e in zip(found, expected, strict=True):
            same_bytes(f, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_additions(device, dtype) -> None:
    """Magnitudes so far apart that every other order gives other bytes."""
    case = Case(60_000, 3, dtype, dtype)
    exponents = torch.randint(-45, 45, (60_000,), generator=torch.Generator().manual_seed(9))
    case.grad *= torch.exp2(exponents.float())
    expected = run_streaming(cpu, case, dtype, False, "cpu")
    shuffled = cpu.coefficient_grad(
        [case.grad.flip(0)], None, [[delta.flip(0) for delta in case.deltas]]
    )
    assert (shuffled[0] != expected[1]).all()
    for offset in (0, 1):
        found = run_streaming(cuda, case.on(device, offset), dtype, False, device, offset)
        for f, e in zip(found, expected, strict=True):
            same_bytes(f, e)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", DTYPES)
def test_dtype_mixes(device, base_dtype, delta_dtype, experts: bool) -> None:
    for out_dtype, grad_dtype in itertools.product(DTYPES, repeat=2):
        case = Case(1032, 3, base_dtype, delta_dtype, grad_dtype)
        expected = run_streaming(cpu, case, out_dtype, experts, "cpu")
        found = run_streaming(cuda, case.on(device), out_dtype, experts, device)
        for f, e in zip(found, expected, strict=True):
            same_bytes(f, e)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_longer_than_a_table(device, dtype, count: int) -> None:
    sizes = [(5, 0, 9000, 64, 768, 1, 333)[i % 7] for i in range(75 if count == 3 else 14)]
    cases = [Case(size, count, dtype, dtype, dtype, seed=i) for i, size in enumerate(sizes)]
    results = []
    for kernels, where in ((cpu, "cpu"), (cuda, device)):
        moved = [case.on(where) for case in cases]
        bases, deltas = [c.base for c in moved], [c.deltas for c in moved]
        outs = [poisoned(size, dtype, where) for size in sizes]
        coefficients = torch.stack([c.coefficients for c in moved])
        kernels.weighted_sum(bases, deltas, coefficients, outs, True)
        results.append([*outs, kernels.coefficient_grad([c.grad for c in moved], bases, deltas)])
    for found, expected in zip(results[1], results[0], strict=True):
        same_bytes(found, expected)


def test_no_tensors_and_no_deltas(device) -> None:
    cuda.weighted_sum([], [], torch.empty(0, 1, device=device), [])
    for dtype in DTYPES:
        case = Case(1000, 0, dtype, dtype)
        expected = run_streaming(cpu, case, dtype, False, "cpu")
        found = run_streaming(cuda, case.on(device), dtype, False, device)
        for f, e in zip(found, expected, strict=True):
            same_bytes(f, e)


@pytest.mark.parametrize("count", [3, 12])
@pytest.mark.parametrize("experts", [False, True])
def test_in_place(device, experts: bool, count: int) -> None:
    case = Case(20000, count, torch.bfloat16, torch.bfloat16)
    out, dots, *_ = run_streaming(cpu, case, torch.bfloat16, experts, "cpu")
    moved = case.on(device)
    arguments = (moved.deltas, moved.coefficients, moved.grad, moved.base, experts)
    same_bytes(cuda.combine_and_dot(moved.base, *arguments), dots)
    same_bytes(moved.base, out)
    moved = case.on(device)
    cuda.weighted_sum([moved.base], [moved.deltas], moved.coefficients[None], [moved.base], experts)
    same_bytes(moved.base, out)


def test_deltas_of_different_dtypes_are_widened(device) -> None:
    case = Case(1000, 0, torch.float32, torch.float32)
    case.deltas = [random_tensor(1000, dtype, 1) for dtype in DTYPES]
    case.coefficients = random_tensor(3, torch.float32, 2)
    expected = run_streaming(cpu, case, torch.float32, True, "cpu")
    found = run_streaming(cuda, case.on(device), torch.float32, True, device)
    for f, e in zip(found, expected, strict=True):
        same_bytes(f, e)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(device, dtype) -> None:
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL))).to(dtype)
    case = Case(0, 0, dtype, dtype)
    case.base, case.deltas = pairs[:, 0].contiguous(), [pairs[:, 1].contiguous()]
    case.coefficients, case.grad = torch.tensor([1.0]), torch.ones(len(pairs))
    for experts, out_dtype in itertools.product([False, True], DTYPES):
        expected = run_streaming(cpu, case, out_dtype, experts, "cpu")
        found = run_streaming(cuda, case.on(device), out_dtype, experts, device)
        for f, e in zip(found, expected, strict=True):
            same_bytes(f, e)


@pytest.mark.parametrize("source", DTYPES[1:])
@pytest.mark.parametrize("target", DTYPES)
def test_conversions_of_every_16_bit_pattern(device, source, target) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(source)
    out, expected = poisoned(2**16, target, device), poisoned(2**16, target, "cpu")
    cpu.weighted_sum([values], [[]], torch.empty(1, 0), [expected])
    cuda.weighted_sum([values.to(device)], [[]], torch.empty(1, 0, device=device), [out])
    same_bytes(out, expected)


@pytest.mark.parametrize("target", DTYPES[1:])
def test_rounding_to_16_bits(device, target) -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(target).float()
    near = halves.view(torch.int32)[:, None] + torch.tensor(
        [-1, 1, 2**12 - 1, 2**12, 2**12 + 1, 2**15 - 1, 2**15, 2**15 + 1], dtype=torch.int32
    )
    values = torch.cat([patterns, near.flatten()]).view(torch.float32)
    results = []
    for kernels, where in ((cpu, "cpu"), (cuda, device)):
        out = poisoned(values.numel(), target, where)
        kernels.weighted_sum([values.to(where)], [[]], torch.empty(1, 0, device=where), [out])
        results.append(out)
    same_bytes(results[1], results[0])


def histograms(kernels, base, delta, prefix, experts, device):
    counts = torch.full((2, 65536), 7, dtype=torch.int64, device=device)
    for level in (0, 1):
        kernels.magnitude_histogram(base, delta, level, prefix, counts[level], experts)
    return counts


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("size", [0, 1, 8, 1000, 8200, 40001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_histogram(device, size: int, dtype, experts: bool) -> None:
    base, delta = random_tensor(size, dtype, 0), random_tensor(size, dtype, 1)
    # Every power of two of the dtype, so that bins outside shared memory are met, and zeros.
    delta[: size // 2] *= torch.exp2(torch.arange(size // 2) % 250 - 140.0).to(dtype)
    delta[::5] = base[::5] if experts else 0
    delta[:8] = torch.tensor(SPECIAL)[:size].to(dtype)
    tau = delta.float() - base.float() if experts else delta.float()
    for index in (0, size // 2, size - 1) if size else (0,):
        prefix = int(tau.abs().view(torch.int32)[index]) >> 15 if size else 0
        expected = histograms(cpu, base, delta, prefix, experts, "cpu")
        for offset in (0, 1):
            b, d = to(device, [base, delta], offset)
            same_bytes(histograms(cuda, b, d, prefix, experts, device), expected)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_threshold_is_the_sorted_value(device, dtype, experts: bool) -> None:
    sizes = [0, 5000, 1, 333]
    tensors = [random_tensor(size, dtype, i) for i, size in enumerate(sizes)]
    bases = [random_tensor(size, dtype, 10 + i) for i, size in enumerate(sizes)]
    tensors[1][:9] = torch.tensor([*SPECIAL, float("nan")]).to(dtype)
    tau = torch.cat(tensors).float() - (torch.cat(bases).float() if experts else 0)
    order = tau.abs().sort().values  # NaN last
    moved = to(device, tensors), to(device, bases) if experts else [None] * len(sizes)
    for position in (1, 2, 700, 4999, order.numel() - 2, order.numel()):
        found = cuda.magnitude_threshold(*moved, position)
        assert found.shape == () and found.dtype == torch.float32
        torch.testing.assert_close(found.cpu(), order[position - 1], rtol=0, atol=0, equal_nan=True)
    empty = torch.empty(0, dtype=dtype, device=device)
    assert cuda.magnitude_threshold([empty], [None], 1).item() == 0


def run_ties(kernels, case, thresholds, device, out_dtype, experts, offset=0, **options):
    size = case.base.numel()
    out = poisoned(size, out_dtype, device, offset)
    masks = torch.full((len(case.deltas), (size + 7) // 8), 255, dtype=torch.uint8, device=device)
    needs_base = experts or options["add_base"]
    base = case.base if needs_base else None
    stats = kernels.ties_merge(base, case.deltas, thresholds, out, experts=experts, **options)
    majority = options["majority"]
    elected = kernels.ties_masks(
        case.base if experts else None,
        case.deltas,
        thresholds,
        masks,
        experts=experts,
        majority=majority,
    )
    return out, stats, masks, elected


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 1000, 1003, 8192, 40001])
def test_ties(device, size: int, mode: int, experts: bool) -> None:
    for index, (count, majority) in enumerate(itertools.product([1, 4, 9, 17], [-1, 0, 1])):
        dtype, out_dtype = DTYPES[(index + size) % 3], DTYPES[index % 3]
        case = Case(size, count, dtype, dtype)
        # Small integers cancel often; some entries are special.
        case.deltas = [(3 * d).round().clamp(-2, 2).to(dtype) for d in case.deltas]
        case.base = case.base.round()
        for k, delta in enumerate(case.deltas):  # infinities of both signs meet
            delta[5:13] = torch.tensor(SPECIAL).roll(k)[: max(0, size - 5)].to(dtype)
        thresholds = torch.rand(count, generator=torch.Generator().manual_seed(index)) * 2
        options = {"mode": mode, "scaling": 0.3, "majority": majority, "add_base": index % 2 == 0}
        expected = run_ties(cpu, case, thresholds, "cpu", out_dtype, experts, **options)
        assert size < 1000 or count == 1 or expected[1][1] > 0
        offset = index % 2
        found = run_ties(
            cuda,
            case.on(device, offset),
            thresholds.to(device),
            device,
            out_dtype,
            experts,
            offset,
            **options,
        )
        for f, e in zip(found, expected, strict=True):
            same_bytes(f, e)


def election_case(size: int, count: int, dtype, votes: str, experts: bool) -> Case:
    """Every third entry cancels, unless votes is "none"; the others vote as it says."""
    case = Case(size, count, dtype, dtype)
    case.base = case.base.round()
    index, tau = torch.arange(size), torch.zeros(count, size)
    sign = {"positive": 1.0, "negative": -1.0, "none": -1.0}.get(votes, 1.0 - index // 3 % 2 * 2)
    tau[0] = sign * (1 + index % 2)
    cancels = (index % 3 == 0) & (votes != "none")
    tau[1] = torch.where(cancels, -tau[0], 0)
    if votes == "tied":
        tau[:, size - size % 6 :] = 0  # as many entries vote up as down
    if size > 20:
        tau[:2, 18:20] = torch.tensor([[float("inf"), 0.0], [-float("inf"), -0.0]])
        if votes == "tied":
            tau[:, 20] = 0
            tau[:, 21:24] = 0
    if experts:
        tau += case.base.float()
    case.deltas = list(tau.to(dtype))
    return case


@pytest.mark.parametrize("votes", ["positive", "negative", "tied", "none"])
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_ties_finds_its_own_majority(device, mode: int, experts: bool, votes: str) -> None:
    sign = {"positive": 1, "negative": -1}.get(votes, 0)
    shapes = [(0, 2, 0), (6, 2, 0), (1003, 2, 1), (8200, 9, 0)]
    for (size, count, offset), dtype in zip(shapes, [*DTYPES, torch.float32], strict=True):
        case = election_case(size, count, dtype, votes, experts)
        thresholds = torch.full((count,), 0.5)
        options = {"mode": mode, "scaling": 0.3, "add_base": True}
        arguments = (thresholds, "cpu", dtype, experts)
        given = {s: run_ties(cpu, case, *arguments, majority=s, **options) for s in (-1, 0, 1)}
        expected, stats = given[sign], given[sign][1].tolist()
        if size:
            assert (stats[1] > 0) == (votes != "none")
            assert (stats[0] > 0) - (stats[0] < 0) == (-1 if votes == "none" else sign)
            assert not stats[1] or not torch.equal(given[1][0], given[-1][0])
        moved = case.on(device, offset)
        rest = (thresholds.to(device), device, dtype, experts, offset)
        for _ in range(2):
            found = run_ties(cuda, moved, *rest, majority=None, **options)
            for f, e in zip(found, expected, strict=True):
                same_bytes(f, e)
        elected = cuda.ties_merge(
            moved.base, moved.deltas, rest[0], moved.base, experts=experts, majority=None, **options
        )
        same_bytes(moved.base, expected[0])
        same_bytes(elected, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes_for_every_grid(device, dtype, monkeypatch) -> None:
    case = Case(200_000, 5, dtype, dtype)
    thresholds = torch.full((5,), 0.5)
    options = {"mode": 0, "scaling": 0.3, "majority": 1, "add_base": True}
    first = None
    for multiprocessors in (1, 2, 5, 1000):
        monkeypatch.setattr(cuda.calls, "multiprocessors", lambda index, n=multiprocessors: n)
        moved = case.on(device)
        results = [
            *run_streaming(cuda, moved, dtype, True, device),
            *run_ties(cuda, moved, thresholds.to(device), device, dtype, True, **options),
            histograms(cuda, moved.base, moved.deltas[0], 32512, True, device),
        ]
        first = first or results
        for f, e in zip(results, first, strict=True):
            same_bytes(f, e)


def test_too_many_deltas_are_refused(device) -> None:
    limit = extensions.cuda.max_deltas
    case = Case(8, limit, torch.float32, torch.float32)
    expected = run_streaming(cpu, case, torch.float32, True, "cpu")
    found = run_streaming(cuda, case.on(device), torch.float32, True, device)
    for f, e in zip(found, expected, strict=True):
        same_bytes(f, e)
    moved = Case(8, limit + 1, torch.float32, torch.float32).on(device)
    with pytest.raises(ValueError, match=f"at most {limit} per tensor, found {limit + 1}"):
        run_streaming(cuda, moved, torch.float32, True, device)
    with pytest.raises(ValueError, match="deltas: the CUDA kernels take at most"):
        cuda.ties_merge(None, moved.deltas, moved.coefficients, moved.grad)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("shape", [(0,), (513,), (8200,), (3, 5), (1, 8195)], ids=str)
def test_elect(device, shape: tuple[int, ...], experts: bool) -> None:
    for index, count in enumerate([2, 9]):
        dtype, unified_dtype = DTYPES[(index + len(shape)) % 3], DTYPES[index % 3]
        size = math.prod(shape)
        case = Case(size, count, dtype, dtype)
        for k, delta in enumerate(case.deltas):
            delta[k % 5 :: 7] = torch.tensor(SPECIAL).to(dtype)[k % len(SPECIAL)]
            delta[3::4] = (-1) ** k  # cancels exactly for an even number of task vectors
        results = []
        for kernels, where, offset in ((cpu, "cpu", 0), (cuda, device, index % 2)):
            moved = case.on(where, offset)
            unified = poisoned(size, unified_dtype, where, offset)
            masks = torch.full((count, *packed_shape(shape)), 0xA5, dtype=torch.uint8, device=where)
            base = moved.base if experts else None
            sums = kernels.elect(
                base, moved.deltas, unified, masks, mask_rows(shape), index % 2 == 0
            )
            results.append((unified, masks, sums))
        for found, expected in zip(results[1], results[0], strict=True):
            same_bytes(found, expected)


@pytest.mark.parametrize("parts", ["sum", "dots", "both"])
@pytest.mark.parametrize("shape", [(0,), (513,), (8200,), (3, 5), (2, 8195), (3, 8256)], ids=str)
def test_masked_combine(device, shape: tuple[int, ...], parts: str) -> None:
    for index, count in enumerate([1, 9]):
        dtypes = [DTYPES[(index + len(shape)) % 3], DTYPES[index], DTYPES[index]]
        size, (rows, columns) = math.prod(shape), mask_rows(shape)
        case = Case(size, count, dtypes[0], dtypes[1], dtypes[2], seed=index)
        case.deltas[0][1::5] = -0.0
        case.coefficients[count // 2] = 0
        generator = torch.Generator().manual_seed(index)
        bits = torch.rand(count, rows, columns, generator=generator) < 0.5
        packed = pack_bits(bits)
        results = []
        for kernels, where, offset in ((cpu, "cpu", 0), (cuda, device, index)):
            moved, masks = case.on(where, offset), packed.to(where).unbind()
            out = poisoned(size, dtypes[1], where, offset) if parts != "dots" else None
            dots = kernels.masked_combine(
                moved.deltas[0],
                masks,
                (rows, columns),
                base=None if index and parts == "sum" else moved.base,
                coefficients=() if out is None else moved.coefficients,
                out=out,
                grad=None if parts == "sum" else moved.grad,
            )
            results.append([t for t in (out, dots) if t is not None])
        for found, expected in zip(results[1], results[0], strict=True):
            same_bytes(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_combine_of_special_values(device, dtype) -> None:
    """In place; a coefficient of 0 leaves its mask out, whatever the unified vector is there."""
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL))).to(dtype)
    base, unified = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    masks = pack_bits(torch.rand(3, 1, 64, generator=torch.Generator().manual_seed(1)) < 0.6)
    lam = torch.tensor([0.5, 0.0, -2.0])
    results = []
    for kernels, where in ((cpu, "cpu"), (cuda, device)):
        out = base.clone().to(where)
        kernels.masked_combine(
            unified.to(where),
            masks.to(where).unbind(),
            (1, 64),
            base=out,
            coefficients=lam.to(where),
            out=out,
        )
        results.append(out)
    same_bytes(results[1], results[0])
    too_many = masks[:1].expand(extensions.cuda.max_deltas + 1, 1, 8).to(device).unbind()
    with pytest.raises(ValueError, match="masks: the CUDA kernels take at most 256"):
        cuda.masked_combine(unified.to(device), too_many, (1, 64), grad=unified.to(device))
