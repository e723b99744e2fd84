"""The CPU kernels against oracles written here, at every instruction-set level and thread count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastmerge import _native
from fastmerge._native import cpu, extensions

from .levels import THREADS, same_everywhere
from .samples import raw

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.unavailable_reason())

SIZES = [0, 1, 7, 15, 16, 17, 255, 257, 8191, 8192, 8193, 100003]
COUNTS = [1, 2, 3, 8, 17]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = 2.0**-24  # half the spacing of fp32 numbers at 1
LANE_ADDITIONS = 32 + 1  # fp32 roundings of one product on its way into fp64
POISON = float("nan")


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    isa, threads = extensions.cpu.isa(), torch.get_num_threads()
    yield
    extensions.cpu.set_isa(isa)
    torch.set_num_threads(threads)


def random_tensor(size: int, dtype: torch.dtype, seed: int, offset: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size + offset, generator=generator).to(dtype)[offset:]


def poisoned(size: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    return torch.full((size + offset,), POISON, dtype=dtype)[offset:]


def task_vectors(base: torch.Tensor, deltas: list[torch.Tensor], experts: bool) -> torch.Tensor:
    """fp32 [K, n]."""
    origin = base.float() if experts else torch.zeros(base.shape)
    return torch.stack([delta.float() - origin for delta in deltas])


def combined(base, deltas, coefficients, experts, dtype):
    total = base.float()
    for coefficient, tau in zip(coefficients, task_vectors(base, deltas, experts), strict=True):
        total = total + coefficient * tau
    return total.to(dtype)


def assert_dots(found: torch.Tensor, grad: torch.Tensor, tau: torch.Tensor) -> None:
    """Within the worst-case rounding of products and sums in fp32 lanes."""
    products = grad.double() * tau.double()  # [K, n]
    truth = products.sum(-1)
    bound = LANE_ADDITIONS * UNIT * products.abs().sum(-1)
    assert found.dtype == torch.float64
    assert ((found - truth).abs() <= bound).all()


def inputs(size, count, base_dtype, delta_dtype, seed=0, offset=0):
    base = random_tensor(size, base_dtype, seed, offset)
    deltas = [random_tensor(size, delta_dtype, seed + 1 + k, offset) for k in range(count)]
    coefficients = random_tensor(count, torch.float32, seed + 100)
    return base, deltas, coefficients


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_streaming_kernels(size: int, experts: bool) -> None:
    for index, count in enumerate(COUNTS):
        dtype = DTYPES[(index + size) % 3]
        base, deltas, coefficients = inputs(size, count, dtype, dtype, offset=1)
        grad = random_tensor(size, torch.float32, 50, offset=1)

        def run(base=base, deltas=deltas, coefficients=coefficients, grad=grad, dtype=dtype):
            out, fused_out = poisoned(size, dtype, 1), poisoned(size, dtype, 1)
            cpu.weighted_sum([base], [deltas], coefficients[None], [out], experts)
            dots = cpu.coefficient_grad([grad], [base] if experts else None, [deltas])[0]
            fused = cpu.combine_and_dot(base, deltas, coefficients, grad, fused_out, experts)
            return out, dots, fused_out, fused

        out, dots, fused_out, fused = same_everywhere(run)
        assert torch.equal(out, combined(base, deltas, coefficients, experts, dtype))
        assert raw(out) == raw(fused_out)
        assert raw(dots) == raw(fused)
        assert_dots(dots, grad, task_vectors(base, deltas, experts))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(
    "base_dtype, delta_dtype, out_dtype", list(itertools.product(DTYPES, repeat=3))
)
def test_dtype_mixes(base_dtype, delta_dtype, out_dtype, experts: bool) -> None:
    base, deltas, coefficients = inputs(1003, 3, base_dtype, delta_dtype)
    grad = random_tensor(1003, out_dtype, 9)
    out, fused_out = poisoned(1003, out_dtype), poisoned(1003, out_dtype)
    cpu.weighted_sum([base], [deltas], coefficients[None], [out], experts)
    dots = cpu.combine_and_dot(base, deltas, coefficients, grad, fused_out, experts)
    assert torch.equal(out, combined(base, deltas, coefficients, experts, out_dtype))
    assert torch.equal(out, fused_out)
    assert_dots(dots, grad, task_vectors(base, deltas, experts))
    separate = cpu.coefficient_grad([grad], [base] if experts else None, [deltas])[0]
    assert torch.equal(dots, separate)


def test_deltas_of_different_dtypes_are_widened() -> None:
    base, _, coefficients = inputs(100, 3, torch.float32, torch.float32)
    deltas = [random_tensor(100, dtype, 1) for dtype in DTYPES]
    out = poisoned(100, torch.float32)
    cpu.weighted_sum([base], [deltas], coefficients[None], [out], True)
    assert torch.equal(out, combined(base, deltas, coefficients, True, torch.float32))
    wide, found = [delta.float() for delta in deltas], out.clone()
    cpu.ties_merge(base, wide, coefficients.abs(), out, experts=True)
    cpu.ties_merge(base, deltas, coefficients.abs(), found, experts=True)
    assert torch.equal(out, found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_list_of_tensors_and_row_panels(dtype: torch.dtype) -> None:
    sizes = [5, 0, 9000, 1, 40000, 0, 333]
    whole = [inputs(size, 3, dtype, dtype, seed=10 * i) for i, size in enumerate(sizes)]
    coefficients = torch.stack([c for _, _, c in whole])
    grads = [random_tensor(size, dtype, 70 + i) for i, size in enumerate(sizes)]

    def run():
        outs = [poisoned(size, dtype) for size in sizes]
        bases, deltas = [b for b, _, _ in whole], [d for _, d, _ in whole]
        cpu.weighted_sum(bases, deltas, coefficients, outs, True)
        return (*outs, cpu.coefficient_grad(grads, bases, deltas))

    *outs, dots = same_everywhere(run)
    for i, (base, deltas, row) in enumerate(whole):
        assert torch.equal(outs[i], combined(base, deltas, row, True, dtype))
        assert_dots(dots[i], grads[i], task_vectors(base, deltas, True))

    matrix, panels = whole[4][0].view(40, 1000), poisoned(40000, dtype).view(40, 1000)
    for start in (0, 7, 21):
        stop = min(start + 19, 40)
        rows = [d.view(40, 1000)[start:stop] for d in whole[4][1]]
        cpu.weighted_sum(
            [matrix[start:stop]], [rows], coefficients[4:5], [panels[start:stop]], True
        )
    assert torch.equal(panels.view(-1), outs[4])


@pytest.mark.parametrize("experts", [False, True])
def test_in_place(experts: bool) -> None:
    base, deltas, coefficients = inputs(20001, 4, torch.bfloat16, torch.bfloat16)
    expected = combined(base, deltas, coefficients, experts, torch.bfloat16)
    grad = random_tensor(20001, torch.float32, 3)
    fused = base.clone()
    dots = cpu.combine_and_dot(fused, deltas, coefficients, grad, fused, experts)
    assert torch.equal(fused, expected)
    assert_dots(dots, grad, task_vectors(base, deltas, experts))
    cpu.weighted_sum([base], [deltas], coefficients[None], [base], experts)
    assert torch.equal(base, expected)


def test_more_deltas_than_one_group() -> None:
    base, deltas, coefficients = inputs(1030, 70, torch.float32, torch.float32)
    grad, out = random_tensor(1030, torch.float32, 3), poisoned(1030, torch.float32)
    dots = cpu.combine_and_dot(base, deltas, coefficients, grad, out, True)
    assert torch.equal(out, combined(base, deltas, coefficients, True, torch.float32))
    assert_dots(dots, grad, task_vectors(base, deltas, True))


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_widening_of_every_16_bit_pattern(source: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(source)

    def run():
        out, again = poisoned(2**16, torch.float32), torch.zeros(2**16, dtype=source)
        empty = torch.empty(1, 0)
        cpu.weighted_sum([values], [[]], empty, [out])
        cpu.weighted_sum([values], [[]], empty, [again])
        return out, again

    out, again = same_everywhere(run)
    nan = values.isnan()
    assert torch.equal(out[~nan], values[~nan].float())
    assert (out[nan].view(torch.int32) == 0x7FC00000).all()
    assert raw(again[~nan]) == raw(values[~nan])
    assert again[nan].isnan().all()


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits(target: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (300_000,), generator=generator)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(target).float()
    # Every representable value, its neighbours in fp32, and the midpoints between two values.
    near = halves.view(torch.int32)[:, None] + torch.tensor(
        [-1, 0, 1, 2**12 - 1, 2**12, 2**12 + 1, 2**15 - 1, 2**15, 2**15 + 1], dtype=torch.int32
    )
    values = torch.cat([patterns.to(torch.int32), near.flatten()]).view(torch.float32)
    values = torch.cat([values, torch.arange(4096).float() * 2.0**-28])

    def run():
        out = torch.zeros(values.numel(), dtype=target)
        cpu.weighted_sum([values], [[]], torch.empty(1, 0), [out])
        return (out,)

    (out,) = same_everywhere(run)
    nan = values.isnan()
    assert raw(out[~nan]) == raw(values[~nan].to(target))
    assert (out[nan].view(torch.int16) == (0x7E00 if target == torch.float16 else 0x7FC0)).all()


def test_nan_and_infinity_pass_through() -> None:
    base = torch.tensor([1.0, float("nan"), float("inf"), float("inf"), 0.0, -0.0] * 5)
    deltas = [torch.tensor([float("nan"), 1.0, -float("inf"), 1.0, float("inf"), -0.0] * 5)]
    coefficients, grad = torch.ones(1, 1), torch.ones(30)

    def run():
        out = torch.zeros(30)
        cpu.weighted_sum([base], [deltas], coefficients, [out])
        return out, cpu.coefficient_grad([grad], None, [deltas])

    out, dots = same_everywhere(run)
    expected = base + deltas[0]
    assert torch.equal(out.isnan(), expected.isnan())
    assert raw(out[~out.isnan()]) == raw(expected[~expected.isnan()])
    assert (out[out.isnan()].view(torch.int32) == 0x7FC00000).all()
    assert dots.isnan().all()


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_histogram(size: int, dtype: torch.dtype, experts: bool) -> None:
    base = random_tensor(size, dtype, 0, offset=1)
    delta = random_tensor(size, dtype, 1, offset=1)
    delta[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")], dtype=dtype)[:size]
    tau = task_vectors(base, [delta], experts)[0]
    magnitude = torch.where(tau.isnan(), torch.tensor(POISON), tau.abs())
    bits = magnitude.numpy().view(np.int32)
    prefix = int(bits[size // 2]) >> 15 if size else 0

    def run():
        counts = torch.full((2, 65536), 7, dtype=torch.int64)
        for level in (0, 1):
            cpu.magnitude_histogram(base, delta, level, prefix, counts[level], experts)
        return (counts - 7,)

    (counts,) = same_everywhere(run)
    high = np.bincount(bits >> 15, minlength=65536)
    low = np.bincount(bits[bits >> 15 == prefix] & 0x7FFF, minlength=65536)
    assert np.array_equal(counts.numpy(), np.stack([high, low]))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_bracket(size: int, dtype: torch.dtype, experts: bool) -> None:
    base = random_tensor(size, dtype, 0, offset=1)
    delta = random_tensor(size, dtype, 1, offset=1)
    delta[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")], dtype=dtype)[:size]
    tau = task_vectors(base, [delta], experts)[0]
    magnitude = torch.where(tau.isnan(), torch.tensor(POISON), tau.abs())
    bits = magnitude.numpy().view(np.int32).astype(np.int64)
    middle = int(np.median(bits)) if size else 1 << 29
    brackets = [(0, 20, 2048), (middle, 0, 1), (max(0, middle - 5000), 3, 4000), (0x7F000000, 8, 1)]
    brackets.append(((1 << 31) - 1, 30, 5))  # reaches past the largest bits there are

    def run():
        results = []
        for low, shift, bins in brackets:
            counts = torch.full((bins + 2,), 7, dtype=torch.int64)
            cpu.magnitude_bracket(base, delta, low, shift, counts, experts)
            results.append(counts - 7)
        return tuple(results)

    for (low, shift, bins), counts in zip(brackets, same_everywhere(run), strict=True):
        places = np.where(bits < low, 0, 1 + np.minimum((bits - low) >> shift, bins))
        assert np.array_equal(counts.numpy(), np.bincount(places, minlength=bins + 2))


def test_histogram_of_a_shared_table_equals_one_threads() -> None:
    delta = random_tensor(1_100_003, torch.float32, 1)
    expected = np.bincount(delta.abs().numpy().view(np.int32) >> 15, minlength=65536)
    for threads in THREADS:
        torch.set_num_threads(threads)
        counts = torch.zeros(65536, dtype=torch.int64)
        cpu.magnitude_histogram(None, delta, 0, 0, counts)
        assert np.array_equal(counts.numpy(), expected)


def ties_oracle(base, deltas, thresholds, experts, mode, scaling, majority, add_base, dtype):
    """TIES one step after the other: merged tensor, masks [K, n] and statistics."""
    tau = task_vectors(base, deltas, experts)  # [K, n]
    kept = torch.where(tau.abs() >= thresholds[:, None], tau, 0)
    total, merged, count = (torch.zeros(base.shape) for _ in range(3))
    for x in kept:
        total = total + x
    elected = (total > 0).int() - (total < 0).int()
    stats = torch.stack([elected.sum(), ((total == 0) & (kept != 0).any(0)).sum()])
    sign = torch.where(elected == 0, majority, elected)
    masks = torch.where(sign > 0, kept > 0, kept < 0)
    for x, mask in zip(kept, masks, strict=True):
        if mode == 2:
            merged = torch.maximum(merged, torch.where(mask, x.abs(), 0))
        else:
            merged = merged + torch.where(mask, x, 0)
        count = count + mask
    if mode == 0:
        merged = merged / count.clamp(min=1)
    if mode == 2:
        merged = torch.where(sign == 0, 0, merged * sign)
    merged = merged * torch.tensor(scaling, dtype=torch.float32)
    return ((base.float() + merged) if add_base else merged).to(dtype), masks, stats


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_ties(size: int, experts: bool) -> None:
    modes = itertools.cycle([(0, 0, True), (1, 1, False), (2, -1, True), (0, -1, False), (2, 0, 0)])
    for index, count in enumerate(COUNTS):
        dtype = DTYPES[(index + size) % 3]
        base, deltas, _ = inputs(size, count, dtype, dtype, offset=1)
        if count > 1 and not experts:
            deltas[1][: size // 3] = -deltas[0][: size // 3]  # cancels exactly when K = 2
        thresholds = random_tensor(count, torch.float32, 5).abs()
        for mode, majority, add_base in itertools.islice(modes, 2):

            def run(base=base, deltas=deltas, thresholds=thresholds, dtype=dtype, mode=mode,
                    majority=majority, add_base=add_base):  # fmt: skip
                out = poisoned(size, dtype, 1)
                stats = cpu.ties_merge(
                    base, deltas, thresholds, out, experts=experts, mode=mode, scaling=0.3,
                    majority=majority, add_base=bool(add_base),
                )  # fmt: skip
                masks = torch.full((len(deltas), (size + 7) // 8), 0xA5, dtype=torch.uint8)
                mask_stats = cpu.ties_masks(
                    base, deltas, thresholds, masks, experts=experts, majority=majority
                )
                return out, stats, masks, mask_stats

            out, stats, masks, mask_stats = same_everywhere(run)
            expected, selected, votes = ties_oracle(
                base, deltas, thresholds, experts, mode, 0.3, majority, add_base, dtype
            )
            assert torch.equal(out, expected)
            assert torch.equal(stats, votes)
            assert torch.equal(mask_stats, votes)
            packed = np.packbits(selected.numpy(), axis=-1, bitorder="little")
            assert np.array_equal(masks.numpy(), packed)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_ties_of_cancelling_and_undefined_values(mode: int) -> None:
    nan, inf = float("nan"), float("inf")
    first = torch.tensor([1.0, 2.0, nan, inf, inf, 0.0, -0.0, 3.0] * 3)
    second = torch.tensor([-1.0, 2.0, 1.0, -inf, 1.0, 0.0, 0.0, nan] * 3)
    base, thresholds = torch.ones(24), torch.zeros(2)
    for majority in (-1, 0, 1):

        def run(majority=majority):
            out = poisoned(24, torch.float32)
            stats = cpu.ties_merge(
                base, [first, second], thresholds, out, mode=mode, majority=majority
            )
            return out, stats

        out, stats = same_everywhere(run)
        expected, _, votes = ties_oracle(
            base, [first, second], thresholds, False, mode, 1.0, majority, False, torch.float32
        )
        assert torch.equal(out, expected)
        assert torch.equal(stats, votes)


def test_ties_without_base_and_in_place() -> None:
    base, deltas, _ = inputs(5000, 3, torch.float32, torch.float32)
    thresholds, out = torch.full((3,), 0.5), poisoned(5000, torch.float32)
    without = cpu.ties_merge(None, deltas, thresholds, out)
    expected, _, votes = ties_oracle(
        base, deltas, thresholds, False, 0, 1.0, 0, False, torch.float32
    )
    assert torch.equal(out, expected) and torch.equal(without, votes)
    expected, _, _ = ties_oracle(base, deltas, thresholds, True, 0, 1.0, 0, True, torch.float32)
    cpu.ties_merge(base, deltas, thresholds, base, experts=True, add_base=True)
    assert torch.equal(base, expected)


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_ties_finds_its_own_majority_in_place_too(sign: int) -> None:
    base, thresholds = torch.arange(6.0), torch.zeros(2)
    deltas = [torch.tensor([3.0, sign, 0, 2, 0, 4]), torch.tensor([-3.0, sign, 0, -2, 0, -4])]
    out, masks = poisoned(6, torch.float32), torch.empty(2, 1, dtype=torch.uint8)
    options = dict(mode=2, add_base=True)
    votes = cpu.ties_merge(base, deltas, thresholds, out, majority=sign, **options)
    cpu.ties_masks(base, deltas, thresholds, masks, majority=sign)
    found, room = torch.full_like(masks, 255), base.clone()
    assert torch.equal(cpu.ties_masks(None, deltas, thresholds, found, majority=None), votes)
    assert torch.equal(found, masks)
    for target in (poisoned(6, torch.float32), room):
        own = cpu.ties_merge(room, deltas, thresholds, target, majority=None, **options)
        assert torch.equal(target, out) and torch.equal(own, votes)


def entropy_oracle(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropy, log-sum-exp and probabilities in the logits' own precision (fp32 or fp64)."""
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    return -torch.where(p == 0, 0, p * log_p).sum(-1), torch.logsumexp(logits, -1), p


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 2, 15, 16, 17, 255, 257, 511, 513, 8193])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_softmax_entropy(rows: int, cols: int, dtype: torch.dtype) -> None:
    storage = random_tensor(rows * (cols + 3), dtype, 3, offset=1) * 6
    logits = storage.view(rows, cols + 3)[:, :cols]  # rows apart by more than their length
    grad = random_tensor(rows, torch.float32, 4)

    def run():
        entropy, lse = cpu.softmax_entropy(logits)
        return entropy, lse, cpu.softmax_entropy_backward(logits, entropy, lse, grad)

    entropy, lse, grad_logits = same_everywhere(run)
    truth, true_lse, p = entropy_oracle(logits.double())
    eager, eager_lse, _ = entropy_oracle(logits.float())
    # A handful of fp32 roundings of the row's own scale beyond what eager fp32 commits.
    scale = 8 * UNIT * (1 + true_lse.abs())
    assert ((entropy - truth).abs() <= (eager - truth).abs() + scale).all()
    assert ((lse - true_lse).abs() <= (eager_lse - true_lse).abs() + scale).all()
    log_p = torch.log_softmax(logits.double(), -1)
    slope = -(p * (log_p + truth[:, None])) * grad[:, None]
    half_step = {torch.float32: UNIT, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    smallest = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}[dtype]
    size = p * (log_p.abs() + truth[:, None] + 1) * grad.abs()[:, None]
    # fp32 log-probabilities carry the log-sum-exp's rounding, which scales every term alike.
    bound = slope.abs() * half_step + size * scale[:, None] + smallest + 1e-38
    assert grad_logits.dtype == dtype
    assert ((grad_logits.double() - slope).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_entropy_of_infinite_and_undefined_logits(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(6, 21, dtype=dtype)
    logits[0, 3:] = -inf  # three equal classes
    logits[1, 1:] = -inf  # one class
    logits[2, 4] = nan
    logits[3] = -inf
    logits[4, 20] = inf
    logits[5, 0] = 60000.0  # its softmax is exactly one class

    def run():
        entropy, lse = cpu.softmax_entropy(logits)
        grad = cpu.softmax_entropy_backward(logits, entropy, lse, torch.ones(6))
        return entropy, lse, grad

    entropy, lse, grad = same_everywhere(run)
    assert abs(entropy[0].item() - np.log(3)) <= 2 * UNIT
    assert entropy[1] == 0 and entropy[5] == 0 and lse[1] == 0
    assert entropy[2:5].isnan().all() and grad[2:5].isnan().all()
    assert (grad[1] == 0).all() and (grad[5] == 0).all()
    assert (grad[0, 3:] == 0).all() and not grad[0].isnan().any()


def test_uniform_rows_have_the_logarithm_of_their_length() -> None:
    for cols in (1, 2, 3, 10, 1000, 50257, 2**20 + 1):
        entropy, lse = cpu.softmax_entropy(torch.full((1, cols), 2.5))
        assert abs(entropy.item() - np.log(cols)) <= UNIT * np.log(cols)
        assert abs(lse.item() - (2.5 + np.log(cols))) <= UNIT * 16


def test_pointer_counts_and_codes_are_checked() -> None:
    x = torch.ones(4)
    with pytest.raises(ValueError, match="deltas: expected 2 pointers, found 1"):
        extensions.cpu.weighted_sum([0], [x.data_ptr()], 0, [0], [4], 2, 0, 0, 0, False, 1)
    with pytest.raises(ValueError, match=r"base_dtype: expected dtype code .* found 3"):
        extensions.cpu.weighted_sum([0], [0], 0, [0], [4], 1, 3, 0, 0, False, 1)
    with pytest.raises(ValueError, match="instruction set: expected one of baseline"):
        extensions.cpu.set_isa("avx1024")


def test_levels() -> None:
    levels = extensions.cpu.supported_isas()
    assert levels[0] == "baseline"
    for level in levels:
        extensions.cpu.set_isa(level)
        assert extensions.cpu.isa() == level
