"""`magnitude_threshold`: the exact k-th largest magnitude, by histograms of the magnitudes' bits.

Non-negative floats are ordered like the integers of their bits. A first histogram counts the high
16 bits, the bin that holds the wanted rank is refined by the bits below, and so on: two reads for
fp32, four for fp64. Counts add up over tensors, row blocks and ranks.

On the CPU a sample replaces the first of two reads: it says about where the rank is, and the counts
in and around a bracket there find the exact magnitude, or that the sample was misleading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native_kernels
from ._library import (
    accumulate_dtype,
    as_task_vector,
    check,
    check_magnitudes,
    register,
    register_no_gradient,
)
from .magnitude_bracket import magnitude_bracket

BINS = 1 << 16
SAMPLED_FROM = 1 << 20  # entries in all from which a sample saves time
SAMPLE_STRETCH, SAMPLE_LINE = 256, 16  # the first 16 of every 256 entries are sampled
SAMPLE_ERRORS = 4
MAX_BRACKET = 1 << 18  # bits; a wider bracket's counts would not stay in the cache
LEVEL_BITS = {torch.float32: (16, 15), torch.float64: (16, 16, 16, 15)}  # sign bit left out


def magnitude_threshold(
    deltas: Tensor | Sequence[Tensor],
    *,
    rank: int | None = None,
    density: float | None = None,
    base: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """Magnitude at a given rank among all entries of one expert's task vector.

    With D entries in all, `density` gives c = the k-th smallest |tau|, k = max(1, D - floor(D *
    density)): entries with |tau| >= c are the ones TIES keeps, floor(D * density) + 1 of them when
    magnitudes differ, and all that are equal to c.

    Args:
        deltas: tensor [*], or a list of tensors of one expert, fp32/fp16/bf16/fp64.
        rank: position from the largest magnitude, 1 <= rank <= D. Either this or density.
        density: fraction kept by trimming, 0 < density <= 1.
        base: tensor or list like deltas; deltas are then the expert's weights, tau = delta - base.

    Returns:
        0-dim fp32 tensor (fp64 if a tensor is fp64). A NaN counts as larger than infinity, so the
        result is NaN when NaN entries reach down to the rank. 0 when density is given and D = 0.

    Raises:
        ValueError: both or none of rank and density, or one out of range, or list lengths differ.
        RuntimeError: shapes, dtypes or devices do not match; names the argument.

    Source: TIES-Merging (arXiv 2306.01708), section 4, trim; the rank rule is its released code's.
    """
    tensors = [deltas] if isinstance(deltas, Tensor) else list(deltas)
    bases = [base] if isinstance(base, Tensor) else [None] * len(tensors) if base is None else base
    if not tensors:
        raise ValueError("magnitude_threshold: deltas is an empty list")
    if len(bases) != len(tensors):
        raise ValueError(f"magnitude_threshold: {len(bases)} base tensors, {len(tensors)} deltas")
    total = sum(t.numel() for t in tensors)
    if (rank is None) == (density is None):
        raise ValueError("magnitude_threshold: give either rank or density")
    if rank is not None and not 1 <= rank <= total:
        raise ValueError(f"magnitude_threshold: rank must be in 1..{total}, got {rank}")
    position = rank_from_density(total, density) if rank is None else total - rank + 1
    accumulate = accumulate_dtype(*tensors, *bases)
    if accumulate == torch.float32 and {t.device.type for t in tensors} == {"cuda"}:
        for t, b in zip(tensors, bases, strict=True):
            _check(t, b, 0, 0, False)
        kernels = native_kernels("magnitude_threshold", *tensors, *bases)
        if kernels is not None and len({t.device for t in tensors}) == 1:
            origins = [None if b is None else b.contiguous() for b in bases]
            return kernels.magnitude_threshold([t.contiguous() for t in tensors], origins, position)
    if accumulate == torch.float32 and total >= SAMPLED_FROM and tensors[0].device.type == "cpu":
        bits = _bracketed(tensors, bases, total, position)
        if bits is not None:
            return magnitude_of_bits(bits, accumulate)
    bits = _exact(tensors, bases, position, accumulate)
    return magnitude_of_bits(bits, accumulate, tensors[0].device)


def _exact(
    tensors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    position: int,
    dtype: torch.dtype,
) -> int:
    """Bits of the position-th smallest magnitude, level by level over all entries."""
    bits = 0
    for level in range(len(LEVEL_BITS[dtype])):
        counts = sum(
            torch.ops.fastmerge.magnitude_histogram(t, b, level, bits, dtype == torch.float64).to(
                tensors[0].device
            )
            for t, b in zip(tensors, bases, strict=True)
        )
        bits, position = refine(counts, level, bits, position, dtype)
    return bits


def _bracketed(
    tensors: Sequence[Tensor], bases: Sequence[Tensor | None], total: int, position: int
) -> int | None:
    """Bits of the position-th smallest fp32 magnitude, from a sample and one read; None: missed."""
    pairs = list(zip(tensors, bases, strict=True))
    sampled = sum(
        torch.ops.fastmerge.magnitude_histogram(_sample(t), _sample(b), 0, 0, False)
        for t, b in pairs
    )
    low, span = bracket(sampled, position / total)
    if span > MAX_BRACKET:
        return None
    counts = sum(magnitude_bracket(t, low, bins=span, base=b) for t, b in pairs)
    reached = counts.cumsum(0)
    place = int(torch.searchsorted(reached, position))
    return low + place - 1 if 0 < place <= span else None


def _sample(tensor: Tensor | None) -> Tensor | None:
    """A cache line of every stretch of entries, [n / 16], the same ones for equal shapes."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1)
    stretches = flat.numel() // SAMPLE_STRETCH
    if stretches == 0:
        return flat
    rows = flat[: stretches * SAMPLE_STRETCH].view(stretches, SAMPLE_STRETCH)
    return rows[:, :SAMPLE_LINE].reshape(-1)


def bracket(sampled: Tensor, fraction: float) -> tuple[int, int]:
    """First bits and width in bits of a bracket that should hold a quantile of magnitudes.

    Four standard errors of the sampled quantile to either side, widened to whole bins.

    Args:
        sampled: int64 [65536], level 0 histogram of a sample.
        fraction: the quantile, in (0, 1].
    """
    count = int(sampled.sum())
    error = SAMPLE_ERRORS * math.sqrt(max(fraction * (1 - fraction), 1 / count) / count)
    ends = torch.tensor([fraction - error, fraction + error], dtype=torch.float64) * count
    ends = ends.clamp(1, count).long()
    first, last = torch.searchsorted(sampled.cumsum(0), ends).tolist()
    width = 1 << LEVEL_BITS[torch.float32][1]
    return first * width, (last - first + 1) * width


def rank_from_density(total: int, density: float) -> int:
    """Position k, counted from the smallest of `total` magnitudes, of the TIES threshold.

    k = max(1, D - floor(D * density)), the product in double precision.

    Raises:
        ValueError: density is not in (0, 1].
    """
    check_density(density)
    return max(1, total - math.floor(total * density))


def check_density(density: float) -> None:
    """Raise ValueError unless 0 < density <= 1."""
    if not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density must be a fraction with 0 < density <= 1, got {density!r}")


def counts_nonfinite(counts: Tensor, dtype: torch.dtype) -> bool:
    """Whether histograms of level 0 count a NaN or Inf.

    Args:
        counts: int64 [..., 65536], may be sparse.
        dtype: fp32 or fp64, the dtype the magnitudes were counted in.
    """
    infinity = 0x7F800000 if dtype == torch.float32 else 0x7FF0000000000000
    first = infinity >> sum(LEVEL_BITS[dtype][1:])
    if counts.is_sparse:
        return bool((counts._indices()[-1] >= first).any())
    return bool(counts[..., first:].any())


def refine(
    counts: Tensor, level: int, bits: int, position: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Descend one level: the bin that holds the position-th smallest magnitude.

    Args:
        counts: int64 [65536], the level's summed histogram.
        level: the histogram's level.
        bits: the high bits found so far, the prefix of that histogram.
        position: position, from 1, among the magnitudes with this prefix.
        dtype: fp32 or fp64, the dtype the magnitudes were counted in.

    Returns:
        The bits extended by the level's, and the position among the magnitudes with these; bits
        of zero if nothing was counted.
    """
    chosen, position_there = find_rank(counts, position)
    if chosen == len(counts):
        return 0, position
    return bits << LEVEL_BITS[dtype][level] | chosen, position_there


def find_rank(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th thing counted, and its rank within the bin, from 1.

    Args:
        counts: int64 [bins].
        rank: from 1.

    Returns:
        (bins, rank) if nothing was counted.
    """
    groups = torch.nn.functional.pad(counts, (0, -len(counts) % 256)).view(-1, 256)
    sums = groups.sum(1)
    reached = sums.cumsum(0)  # and then only one group is summed step by step
    if reached[-1] == 0:
        return len(counts), rank
    group = int(torch.searchsorted(reached, rank))
    rank -= int(reached[group] - sums[group])
    within = groups[group].cumsum(0)
    chosen = int(torch.searchsorted(within, rank))
    return group * 256 + chosen, rank - int(within[chosen] - groups[group][chosen])


def magnitude_of_bits(bits: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The non-negative number with these bits, as a 0-dim tensor of `dtype`."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    return torch.tensor([bits], dtype=integer, device=device).view(dtype)[0]


def _check(delta, base, level, prefix, double):
    op = "magnitude_histogram"
    check_magnitudes(op, delta, base)
    check(
        double or accumulate_dtype(delta, base) == torch.float32,
        lambda: f"{op}: double must be True for fp64 tensors",
    )
    levels = len(LEVEL_BITS[torch.float64 if double else torch.float32])
    check(0 <= level < levels, lambda: f"{op}: level {level}, expected 0..{levels - 1}")


def magnitude_bins(
    delta: Tensor, base: Tensor | None, level: int, prefix: int, double: bool
) -> Tensor:
    """The bins that `magnitude_histogram` would count, one for each entry counted: int64 [n]."""
    dtype = torch.float64 if double else torch.float32
    magnitude = as_task_vector(base, delta, base is not None, dtype).abs().flatten()
    magnitude = torch.where(magnitude.isnan(), torch.nan, magnitude)  # one NaN
    bits = magnitude.view(torch.int64 if double else torch.int32)
    width = LEVEL_BITS[dtype][level]
    shift = sum(LEVEL_BITS[dtype][level + 1 :])
    if level > 0:
        bits = bits[bits >> (shift + width) == prefix]
    return ((bits >> shift) & ((1 << width) - 1)).long()


def _reference(delta, base, level, prefix, double):
    """Counts of one group of bits of |tau|, among the entries whose higher bits are `prefix`."""
    _check(delta, base, level, prefix, double)
    return torch.bincount(magnitude_bins(delta, base, level, prefix, double), minlength=BINS)


def _compiled(delta, base, level, prefix, double):
    kernels = None if double else native_kernels("magnitude_histogram", delta, base)
    if kernels is None:
        return _reference(delta, base, level, prefix, double)
    _check(delta, base, level, prefix, double)
    counts = torch.zeros(BINS, dtype=torch.int64, device=delta.device)
    kernels.magnitude_histogram(
        None if base is None else base.contiguous(),
        delta.contiguous(),
        level,
        prefix,
        counts,
        base is not None,
    )
    return counts


def _fake(delta, base, level, prefix, double):
    _check(delta, base, level, prefix, double)
    return delta.new_empty(BINS, dtype=torch.int64)


register(
    "magnitude_histogram(Tensor delta, Tensor? base, int level, int prefix, bool double) -> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_no_gradient("magnitude_histogram")
