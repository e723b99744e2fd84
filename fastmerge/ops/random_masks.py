"""`random_masks`: randomly kept entries, 1 bit each, from a counter-based generator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native_kernels
from ._bits import pack_bits
from ._library import (
    accumulate_dtype,
    as_task_vector,
    check,
    check_float,
    check_source,
    check_width,
    register,
    register_no_gradient,
    row_width,
)


def random_masks(
    deltas: Sequence[Tensor],
    probabilities: Tensor,
    *,
    key: int,
    base: Tensor | None = None,
    width: int | None = None,
    offset: int = 0,
) -> Tensor:
    """Keep every entry with a probability that grows evenly with its rank in its row.

    p = p0 + (p1 - p0) r / (width - 1), r = 0 for the smallest |tau| of the row, equal magnitudes in
    the order of their indices; the middle of p0 and p1 for width 1. An entry is kept if its draw u,
    32 bits of Philox4x32-10 under `key`, is below floor(2^32 p); u depends on key, k and the
    entry's index only.

    Args:
        deltas: K tensors [*] of one dtype with n entries: task vectors, or experts with a base.
            They are read where p0 and p1 differ.
        probabilities: [K, 2] p0 <= p1, between 0 and 1.
        key: 64 bits, for example of `random_key`.
        base: [*], subtracted from the deltas.
        width: entries of one row, by default the last dimension.
        offset: index of the first entry, for a block of a larger tensor.

    Returns:
        uint8 [K, ceil(n / 8)]: entry i is bit i % 8 of byte i // 8, unused bits are 0.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.

    Source: DARE (arXiv 2311.03099) with p0 = p1; MagPrune of DELLA (arXiv 2406.11617). Philox:
    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    deltas = list(deltas)
    width = row_width(deltas[0]) if width is None else width
    return torch.ops.fastmerge.random_masks(deltas, probabilities, base, width, key, offset)


def random_key(seed: int, name: str) -> int:
    """The key of a tensor's draws: 64 bits of a hash of seed and tensor name, as a signed int."""
    digest = hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def philox(counters: Tensor, expert: int, stream: int, key: int) -> tuple[Tensor, ...]:
    """Four 32-bit words of Philox4x32-10 for every counter.

    Args:
        counters: int64 [*]: words 0 and 1 of the counter.
        expert, stream: words 2 and 3.
        key: 64 bits.

    Returns:
        Four int64 tensors [*] with values in 0..2^32 - 1.
    """
    low = (1 << 32) - 1
    c0, c1 = counters & low, counters >> 32 & low
    c2, c3 = torch.full_like(c0, expert), torch.full_like(c0, stream)
    k0, k1 = key & low, key >> 32 & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps, as the bits of the unsigned product
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def draws(size: int, offset: int, expert: int, key: int, device: torch.device | str) -> Tensor:
    """The 32-bit draws of entries offset .. offset + size as int64 [size]."""
    return draws_of(torch.arange(offset, offset + size, device=device), expert, key)


def draws_of(entries: Tensor, expert: int, key: int) -> Tensor:
    """The 32-bit draws of entries, int64 like `entries`, which are their indices.

    Entry e takes counter (e // 64) * 8 + (e % 32) // 4, there half (e // 32) % 2 * 4 + e % 4 of the
    eight halves of 16 bits, the low one of a word first: its high bits from stream 0, its low bits
    from stream 1.
    """
    counters, half = entries // 64 * 8 + entries % 32 // 4, entries // 32 % 2 * 4 + entries % 4
    parts = []
    for stream in (0, 1):
        words = torch.stack(philox(counters, expert, stream, key))  # [4, *]
        word = words.gather(0, (half // 2).unsqueeze(0)).squeeze(0)
        parts.append(word >> 16 * (half % 2) & 0xFFFF)
    return parts[0] << 16 | parts[1]


def _check(deltas, probabilities, base, width, key, offset):
    op = "random_masks"
    check_source(op, deltas, base)
    check_width(op, deltas[0], width)
    check_float(op, "probabilities", probabilities)
    check(
        list(probabilities.shape) == [len(deltas), 2] and probabilities.device == deltas[0].device,
        lambda: (
            f"{op}: probabilities is {list(probabilities.shape)} on {probabilities.device}, "
            f"expected [{len(deltas)}, 2] on {deltas[0].device}"
        ),
    )


def _reference(deltas, probabilities, base, width, key, offset):
    _check(deltas, probabilities, base, width, key, offset)
    size, device = deltas[0].numel(), deltas[0].device
    rows = []
    for k, (delta, (low, high)) in enumerate(
        zip(deltas, probabilities.double().tolist(), strict=True)
    ):
        thresholds: int | Tensor = int(low * 2.0**32)
        if low != high and size:
            dtype = accumulate_dtype(delta, base)
            magnitude = (
                as_task_vector(base, delta, base is not None, dtype).abs().reshape(-1, width)
            )
            order = magnitude.argsort(dim=1, stable=True)
            rank = torch.empty_like(order).scatter_(
                1, order, torch.arange(width, device=device).expand_as(order)
            )
            share = rank.double() * (1 / (width - 1)) if width > 1 else rank.double() + 0.5
            thresholds = ((low + (high - low) * share) * 2.0**32).long().flatten()
        rows.append(pack_bits(draws(size, offset, k, key, device) < thresholds))
    return torch.stack(rows)


def _compiled(deltas, probabilities, base, width, key, offset):
    kernels = native_kernels("random_masks", *deltas[:1], base)
    if kernels is None:
        return _reference(deltas, probabilities, base, width, key, offset)
    masks = _fake(deltas, probabilities, base, width, key, offset)
    kernels.random_masks(
        None if base is None else base.contiguous(),
        [d.contiguous() for d in deltas],
        probabilities.double().contiguous(),
        masks,
        width,
        key,
        offset,
    )
    return masks


def _fake(deltas, probabilities, base, width, key, offset):
    _check(deltas, probabilities, base, width, key, offset)
    shape = (len(deltas), (deltas[0].numel() + 7) // 8)
    return deltas[0].new_empty(shape, dtype=torch.uint8)


register(
    "random_masks(Tensor[] deltas, Tensor probabilities, Tensor? base, int width, int key, "
    "int offset) -> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_no_gradient("random_masks")
