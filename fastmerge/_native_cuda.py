"""The compiled CUDA kernels as functions of tensors, with the signatures of `_native`'s.

Callers pass contiguous CUDA tensors of one device whose shapes and dtypes they have checked.
Work is queued on the device's current stream; nothing waits for it, so calls can be captured in a
CUDA graph. Tensors of one argument that differ in dtype are widened to fp32 first, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ._native import _address, _addresses, _code, _one_dtype, cuda


@cache
def unavailable_reason(device: torch.device) -> str:
    """Why the kernels cannot run on a CUDA device; empty when they can."""
    info = cuda.device_info()
    if info["reason"]:
        return info["reason"]
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = cuda.device_reason(index)
    if reason:
        major, minor = torch.cuda.get_device_capability(index)
        return f"compiled for sm {info['archs']}, the device is sm {major}{minor}: {reason}"
    return ""


def weighted_sum(
    bases: Sequence[Tensor],
    deltas: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    outs: Sequence[Tensor],
    experts: bool = False,
) -> None:
    """Write bases[l] + sum_k coefficients[l, k] * tau_lk into outs[l], in fp32, rounded once.

    Args:
        bases: L tensors of one dtype.
        deltas: L lists of K <= 256 tensors; tau = delta - base with `experts`, else tau = delta.
        coefficients: fp32 [L, K].
        outs: L tensors of one dtype; outs[l] may be bases[l].
        experts: whether deltas are fine-tuned weights.

    Raises:
        ValueError: too many deltas.
    """
    if not outs:
        return
    bases, flat = _one_dtype(bases), _flat(deltas)
    cuda.weighted_sum(
        _place(outs[0]),
        _tensors(bases, flat, outs, experts),
        coefficients.data_ptr(),
        _addresses(outs),
        _code(outs),
    )


def coefficient_grad(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor] | None,
    deltas: Sequence[Sequence[Tensor]],
    experts: bool | None = None,
) -> Tensor:
    """Inner products <grads[l], tau_lk> as fp64 [L, K].

    Args:
        grads: L >= 1 tensors of one dtype.
        bases: L tensors of one dtype, or None.
        deltas: L lists of K <= 256 tensors.
        experts: whether deltas are fine-tuned weights; by default, whether bases are given.

    Raises:
        ValueError: too many deltas.
    """
    experts = bases is not None if experts is None else experts
    grads, flat = _one_dtype(grads), _flat(deltas)
    bases = _one_dtype(bases) if experts else [None] * len(grads)
    dots, scratch = _dots(grads, len(deltas[0]))
    cuda.coefficient_grad(
        _place(grads[0]),
        _tensors(bases, flat, grads, experts),
        _addresses(grads),
        _code(grads),
        dots.data_ptr(),
        scratch.data_ptr(),
    )
    return dots


def combine_and_dot(
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    grad: Tensor,
    out: Tensor,
    experts: bool = False,
) -> Tensor:
    """Write the weighted sum of one tensor into `out` and return <grad, tau_k> as fp64 [K].

    One read of base, deltas and grad for K <= 8, two for more; the bytes are those of
    weighted_sum and coefficient_grad.

    Args:
        base, grad, out: tensors of one size; out may be base but not grad.
        deltas: K <= 256 tensors of that size.
        coefficients: fp32 [K].
        experts: whether deltas are fine-tuned weights.

    Raises:
        ValueError: too many deltas.
    """
    deltas = _one_dtype(deltas)
    dots, scratch = _dots([grad], len(deltas))
    cuda.combine_and_dot(
        _place(out),
        _tensors([base], deltas, [out], experts),
        coefficients.data_ptr(),
        [grad.data_ptr()],
        _code([grad]),
        [out.data_ptr()],
        _code([out]),
        dots.data_ptr(),
        scratch.data_ptr(),
    )
    return dots[0]


def magnitude_histogram(
    base: Tensor | None,
    delta: Tensor,
    level: int,
    prefix: int,
    counts: Tensor,
    experts: bool = False,
) -> None:
    """Add to `counts` how often each group of bits occurs among the magnitudes |tau|.

    With u the 31 bits of fp32 |tau|: level 0 counts u >> 15, level 1 counts u & 0x7fff among the
    entries whose u >> 15 is `prefix`.

    Args:
        base, delta: tensors of one size; base may be None without `experts`.
        counts: int64 [65536], added to.
        experts: whether delta holds fine-tuned weights.
    """
    _histogram(base if experts else None, delta, level, prefix, 0, counts)


def magnitude_threshold(
    tensors: Sequence[Tensor], bases: Sequence[Tensor | None], position: int
) -> Tensor:
    """The position-th smallest magnitude of the entries of a list, found without the host.

    Args:
        tensors: tensors of one device, each of any of the dtypes.
        bases: tensors like them to subtract, or None.
        position: rank, from 1, among all entries.

    Returns:
        0-dim fp32 tensor; a NaN counts as larger than infinity; 0 if there are no entries.
    """
    device = tensors[0].device
    # Filled on the device: a copy from the host could not be captured in a graph.
    found = torch.zeros(1, dtype=torch.int64, device=device)
    rank = torch.full((1,), position, dtype=torch.int64, device=device)
    counts = torch.zeros(2, cuda.histogram_bins, dtype=torch.int64, device=device)
    for level in range(2):
        for tensor, base in zip(tensors, bases, strict=True):
            _histogram(base, tensor, level, 0, found.data_ptr(), counts[level])
        cuda.magnitude_refine(
            _place(found), counts[level].data_ptr(), found.data_ptr(), rank.data_ptr(), level
        )
    return found.to(torch.int32).view(torch.float32)[0]


def ties_merge(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    thresholds: Tensor,
    out: Tensor,
    *,
    experts: bool = False,
    mode: int = 0,
    scaling: float = 1.0,
    majority: int | None = 0,
    add_base: bool = False,
) -> Tensor:
    """Trim, elect and merge one tensor into `out`.

    out = scaling * merge of the kept tau_k that have the elected sign, plus base with `add_base`.

    Args:
        base: needed with `experts` or `add_base`.
        deltas: K <= 256 tensors of one size.
        thresholds: fp32 [K]; tau_k is kept where |tau_k| >= thresholds[k].
        out: tensor of that size; may be base.
        mode: 0 mean, 1 sum, 2 largest magnitude.
        majority: the sign, -1, 0 or 1, where the kept values add up to zero; None takes the
            majority that the returned votes give, without the host.

    Returns:
        int64 [2]: the sum of the elected signs before `majority`, and the number of entries whose
        kept values cancel exactly.

    Raises:
        ValueError: too many deltas.
    """
    deltas = _one_dtype(deltas)
    stats = torch.empty(2, dtype=torch.int64, device=out.device)
    cuda.ties_merge(
        _place(out),
        _tensors([base], deltas, [out], experts),
        thresholds.data_ptr(),
        out.data_ptr(),
        _code([out]),
        stats.data_ptr(),
        mode,
        scaling,
        majority,
        add_base,
    )
    return stats


def ties_masks(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    thresholds: Tensor,
    masks: Tensor,
    *,
    experts: bool = False,
    majority: int | None = 0,
) -> Tensor:
    """Write which entries of each tau_k TIES keeps and elects as packed bits.

    Args:
        masks: uint8 [K, ceil(n / 8)]: entry i is bit i % 8 of byte i // 8, unused bits are 0.
        base, deltas, thresholds, experts, majority: as in `ties_merge`.

    Returns:
        int64 [2] as from `ties_merge`.

    Raises:
        ValueError: too many deltas.
    """
    deltas = _one_dtype(deltas)
    stats = torch.empty(2, dtype=torch.int64, device=masks.device)
    cuda.ties_masks(
        _place(masks),
        _tensors([base], deltas, deltas[:1], experts),
        thresholds.data_ptr(),
        masks.data_ptr(),
        stats.data_ptr(),
        majority,
    )
    return stats


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _place(tensor: Tensor):
    """The device and the current stream for work on a tensor."""
    index = tensor.get_device()
    stream = torch.cuda.current_stream(index).cuda_stream
    return cuda.Place(index, _multiprocessors(index), stream)


def _tensors(
    bases: Sequence[Tensor | None], flat: Sequence[Tensor], like: Sequence[Tensor], experts: bool
):
    """L bases and their L * K deltas; `like` are L tensors that give the sizes."""
    return cuda.Tensors(
        [_address(base) for base in bases],
        _addresses(flat),
        [tensor.numel() for tensor in like],
        len(flat) // len(like),
        _code([base for base in bases if base is not None]),
        _code(flat),
        experts,
    )


def _histogram(
    base: Tensor | None, delta: Tensor, level: int, prefix: int, bits: int, counts: Tensor
) -> None:
    """`magnitude_histogram` with the prefix in a number or at the device address `bits`."""
    cuda.magnitude_histogram(
        _place(delta),
        _address(base),
        delta.data_ptr(),
        delta.numel(),
        _code([] if base is None else [base]),
        _code([delta]),
        base is not None,
        level,
        prefix,
        bits,
        counts.data_ptr(),
    )


def _flat(deltas: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    return _one_dtype([delta for row in deltas for delta in row])


def _dots(grads: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Results fp64 [L, K] and the scratch of their reduction."""
    doubles = sum(cuda.scratch_doubles(grad.numel(), k) for grad in grads)
    options = {"dtype": torch.float64, "device": grads[0].device}
    return torch.empty(len(grads), k, **options), torch.empty(doubles, **options)
