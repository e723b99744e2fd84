"""`magnitude_masks`: the entries between two cuts of the order of magnitudes, 1 bit each.

`tie_counts` finds where to cut among entries of one magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native_kernels
from ._bits import pack_bits
from ._library import (
    accumulate_dtype,
    as_task_vector,
    check,
    check_source,
    register,
    register_no_gradient,
)


def magnitude_masks(
    deltas: Sequence[Tensor],
    values: Tensor,
    indices: Tensor,
    *,
    base: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Entries of each task vector above one cut of the order of magnitudes and not above another.

    An entry is above the cut (c, i) if |tau| > c, or |tau| = c and its index is below i: with c
    the k-th largest magnitude, one i makes exactly k entries lie above, equal magnitudes in the
    order of their indices. A NaN is above no cut.

    Args:
        deltas: K tensors [*] of one dtype with n entries: task vectors, or experts with a base.
        values: [K, 2] upper and lower c, fp32 (fp64 where |tau| is to be compared in fp64).
        indices: int64 [K, 2] upper and lower i.
        base: [*], subtracted from the deltas.
        offset: index of the first entry, for a block of a larger tensor.

    Returns:
        uint8 [K, ceil(n / 8)]: entry i is bit i % 8 of byte i // 8, unused bits are 0.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.

    Source: trimming in TIES-Merging (arXiv 2306.01708); two cuts in Model Breadcrumbs (2312.06795).
    """
    return torch.ops.fastmerge.magnitude_masks(list(deltas), values, indices, base, offset)


def tie_counts(
    deltas: Sequence[Tensor],
    values: Tensor,
    starts: Tensor,
    *,
    width: int,
    bins: int,
    base: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Count the entries of a given magnitude by their index.

    counts_kb = number of entries with |tau_k| = c_k and index in s_k + b width .. s_k + (b + 1)
    width, the end excluded.

    Args:
        deltas: K tensors [*] of one dtype: task vectors, or experts with a base.
        values: [K] c, fp32 (fp64 where |tau| is to be compared in fp64).
        starts: int64 [K] s.
        width: indices of one bin.
        bins: number of bins.
        base: [*], subtracted from the deltas.
        offset: index of the first entry, for a block of a larger tensor.

    Returns:
        int64 [K, bins].

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.
    """
    return torch.ops.fastmerge.tie_counts(list(deltas), values, starts, base, width, bins, offset)


def _check(deltas, values, indices, base, offset):
    op = "magnitude_masks"
    check_source(op, deltas, base)
    for name, tensor in (("values", values), ("indices", indices)):
        check(
            list(tensor.shape) == [len(deltas), 2] and tensor.device == deltas[0].device,
            lambda name=name, tensor=tensor: (
                f"{op}: {name} is {list(tensor.shape)} on {tensor.device}, "
                f"expected [{len(deltas)}, 2] on {deltas[0].device}"
            ),
        )
    check(
        values.dtype in (torch.float32, torch.float64),
        lambda: f"{op}: values must be fp32 or fp64, got {values.dtype}",
    )
    check(indices.dtype == torch.int64, lambda: f"{op}: indices must be int64, got {indices.dtype}")


def _reference(deltas, values, indices, base, offset):
    _check(deltas, values, indices, base, offset)
    dtype = accumulate_dtype(deltas[0], base, values)
    index = torch.arange(offset, offset + deltas[0].numel(), device=deltas[0].device)
    rows = []
    for delta, value, cut in zip(deltas, values, indices, strict=True):
        magnitude = as_task_vector(base, delta, base is not None, dtype).abs().flatten()
        upper, lower = (
            (magnitude > c) | ((magnitude == c) & (index < i))
            for c, i in zip(value.to(dtype), cut, strict=True)
        )
        rows.append(pack_bits(lower & ~upper))
    return torch.stack(rows)


def _compiled(deltas, values, indices, base, offset):
    kernels = native_kernels("magnitude_masks", *deltas[:1], base, values)
    if kernels is None:
        return _reference(deltas, values, indices, base, offset)
    masks = _fake(deltas, values, indices, base, offset)
    kernels.magnitude_masks(
        None if base is None else base.contiguous(),
        [d.contiguous() for d in deltas],
        values.contiguous(),
        indices.contiguous(),
        masks,
        offset,
    )
    return masks


def _fake(deltas, values, indices, base, offset):
    _check(deltas, values, indices, base, offset)
    shape = (len(deltas), (deltas[0].numel() + 7) // 8)
    return deltas[0].new_empty(shape, dtype=torch.uint8)


register(
    "magnitude_masks(Tensor[] deltas, Tensor values, Tensor indices, Tensor? base, int offset) "
    "-> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_no_gradient("magnitude_masks")


def _check_ties(deltas, values, starts, base, width, bins, offset):
    op = "tie_counts"
    check_source(op, deltas, base)
    for name, tensor in (("values", values), ("starts", starts)):
        check(
            list(tensor.shape) == [len(deltas)] and tensor.device == deltas[0].device,
            lambda name=name, tensor=tensor: (
                f"{op}: {name} is {list(tensor.shape)} on {tensor.device}, "
                f"expected [{len(deltas)}] on {deltas[0].device}"
            ),
        )
    check(
        values.dtype in (torch.float32, torch.float64),
        lambda: f"{op}: values must be fp32 or fp64, got {values.dtype}",
    )
    check(starts.dtype == torch.int64, lambda: f"{op}: starts must be int64, got {starts.dtype}")
    check(width > 0 and bins > 0, lambda: f"{op}: width {width} and bins {bins} must be positive")


def _ties_reference(deltas, values, starts, base, width, bins, offset):
    _check_ties(deltas, values, starts, base, width, bins, offset)
    dtype = accumulate_dtype(deltas[0], base, values)
    rows = []
    for delta, value, start in zip(deltas, values.to(dtype), starts, strict=True):
        magnitude = as_task_vector(base, delta, base is not None, dtype).abs().flatten()
        index = (magnitude == value).nonzero().squeeze(1) + offset - start
        index = index[(index >= 0) & (index < width * bins)]
        rows.append(torch.bincount(index // width, minlength=bins))
    return torch.stack(rows)


def _ties_compiled(deltas, values, starts, base, width, bins, offset):
    kernels = native_kernels("tie_counts", *deltas[:1], base, values)
    if kernels is None:
        return _ties_reference(deltas, values, starts, base, width, bins, offset)
    counts = _ties_fake(deltas, values, starts, base, width, bins, offset).zero_()
    kernels.tie_counts(
        None if base is None else base.contiguous(),
        [d.contiguous() for d in deltas],
        values.contiguous(),
        starts.contiguous(),
        counts,
        width,
        offset,
    )
    return counts


def _ties_fake(deltas, values, starts, base, width, bins, offset):
    _check_ties(deltas, values, starts, base, width, bins, offset)
    return deltas[0].new_empty((len(deltas), bins), dtype=torch.int64)


register(
    "tie_counts(Tensor[] deltas, Tensor values, Tensor starts, Tensor? base, int width, int bins, "
    "int offset) -> Tensor",
    reference=_ties_reference,
    compiled=_ties_compiled,
    fake=_ties_fake,
)
register_no_gradient("tie_counts")
