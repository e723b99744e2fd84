"""`masked_merge`: weighted merge of masked task vectors, with an election of signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native_kernels
from ._bits import unpack_bits
from ._library import (
    accumulate_dtype,
    as_task_vector,
    check,
    check_deltas,
    check_float,
    check_source,
    check_width,
    refuse_gradient,
    register,
    register_no_gradient,
    row_width,
    unpack_deltas,
)


def masked_merge(
    deltas: object,
    factors: Tensor,
    *,
    masks: Tensor | None = None,
    base: Tensor | None = None,
    elect: bool = False,
    normalize: bool = False,
    least: float = 0.0,
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Merge masked task vectors, each with a weight, after an election of signs or without.

    x_k = tau_k where mask_k, else 0; v_k = factors_0k x_k; y_k = factors_1k x_k. Without `elect`
    m = sum_k y_k. With it s = + where sum_k v_k >= 0, else -, and m is the sum of the y_k whose v_k
    has the sign s; `normalize` divides it by w, the sum of their factors_2k, raised to `least`, and
    by 1 where w = 0. out = base + scaling * m.

    Args:
        deltas: K tensors [*] of one dtype (task vectors), or a delta format.
        factors: [3, K] votes, values and weights.
        masks: uint8 [K, ceil(n / 8)] packed bits, or [1, ceil(n / 8)] for all; None: all entries.
        base: [*], added to the result; needed by the format `Experts`.
        elect: whether signs are elected.
        normalize: whether to divide by the weights of the entries that agree; needs `elect`.
        least: smallest divisor, if above 0.
        scaling: factor of the merged task vector.
        dtype: dtype of the result, by default base's, or the deltas'.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.

    Source: TIES-Merging (arXiv 2306.01708) with weights, as merge tools generalize it.
    """
    tensors, experts = unpack_deltas(deltas)
    return torch.ops.fastmerge.masked_merge(
        tensors,
        factors,
        masks,
        base,
        experts,
        base is not None,
        elect,
        normalize,
        least,
        scaling,
        dtype,
    )


def masked_sums(
    deltas: Sequence[Tensor],
    *,
    masks: Tensor | None = None,
    base: Tensor | None = None,
    width: int | None = None,
    square: bool = False,
) -> Tensor:
    """Sums along rows of |tau_k|, or of its square, over all entries and over the masked ones.

    Args:
        deltas: K tensors [*] of one dtype: task vectors, or experts with a base.
        masks: as in `masked_merge`.
        base: [*], subtracted from the deltas.
        width: entries of one row, by default the last dimension.
        square: whether squares are summed.

    Returns:
        fp64 [rows, 2, K]; `exact_sums` adds them up.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.
    """
    deltas = list(deltas)
    width = row_width(deltas[0]) if width is None else width
    return torch.ops.fastmerge.masked_sums(deltas, masks, base, width, square)


def _check_masks(op, deltas, masks):
    if masks is None:
        return
    columns = (deltas[0].numel() + 7) // 8
    check(
        masks.dtype == torch.uint8
        and masks.dim() == 2
        and masks.shape[0] in (1, len(deltas))
        and masks.shape[1] == columns
        and masks.device == deltas[0].device,
        lambda: (
            f"{op}: masks is {masks.dtype} {list(masks.shape)} on {masks.device}, expected "
            f"torch.uint8 [{len(deltas)}, {columns}] on {deltas[0].device}"
        ),
    )


def _check(deltas, factors, masks, base, experts, add_base, elect, normalize):
    op = "masked_merge"
    check(len(deltas) > 0, lambda: f"{op}: deltas is empty, expected K >= 1 tensors")
    first = deltas[0] if base is None else base
    check_deltas(op, first, deltas, base_name="deltas[0]" if base is None else "base")
    check_float(op, "factors", factors)
    check(
        list(factors.shape) == [3, len(deltas)] and factors.device == first.device,
        lambda: (
            f"{op}: factors is {list(factors.shape)} on {factors.device}, "
            f"expected [3, {len(deltas)}] on {first.device}"
        ),
    )
    _check_masks(op, deltas, masks)
    check(base is not None or not (experts or add_base), lambda: f"{op}: experts need base")
    check(elect or not normalize, lambda: f"{op}: normalize needs elect")


def _masked(deltas, masks, base, experts, dtype):
    """The x_k one after the other, [*] in `dtype`."""
    for k, delta in enumerate(deltas):
        tau = as_task_vector(base, delta, experts, dtype)
        if masks is not None:
            row = masks[0 if len(masks) == 1 else k]
            tau = torch.where(unpack_bits(row, tau.numel()).view(tau.shape), tau, 0)
        yield tau


def _reference(
    deltas, factors, masks, base, experts, add_base, elect, normalize, least, scaling, dtype
):
    _check(deltas, factors, masks, base, experts, add_base, elect, normalize)
    refuse_gradient("masked_merge", "deltas", deltas)
    accumulate = accumulate_dtype(deltas[0], base, factors)
    votes, values, weights = factors.to(accumulate)
    zero = torch.zeros(deltas[0].shape, dtype=accumulate, device=deltas[0].device)
    total, merged, divisor = zero, zero, zero
    if elect:
        for x, vote in zip(_masked(deltas, masks, base, experts, accumulate), votes, strict=True):
            total = total + vote * x
    for x, vote, value, weight in zip(
        _masked(deltas, masks, base, experts, accumulate), votes, values, weights, strict=True
    ):
        if not elect:
            merged = merged + value * x
            continue
        selected = torch.where(total >= 0, vote * x > 0, vote * x < 0)
        merged = merged + torch.where(selected, value * x, 0)
        divisor = divisor + torch.where(selected, weight, 0)
    if normalize:
        if least > 0:
            divisor = divisor.clamp(min=torch.tensor(least, dtype=accumulate))
        merged = merged / torch.where(divisor == 0, 1, divisor)
    merged = merged * torch.tensor(scaling, dtype=accumulate)
    if add_base:
        merged = base.to(accumulate) + merged
    return merged.to(dtype or (deltas[0] if base is None else base).dtype)


def _compiled(
    deltas, factors, masks, base, experts, add_base, elect, normalize, least, scaling, dtype
):
    out = _fake(
        deltas, factors, masks, base, experts, add_base, elect, normalize, least, scaling, dtype
    )
    kernels = native_kernels("masked_merge", out, *deltas[:1], base, factors)
    if kernels is None:
        return _reference(
            deltas, factors, masks, base, experts, add_base, elect, normalize, least, scaling, dtype
        )
    kernels.masked_merge(
        None if base is None else base.contiguous(),
        [d.contiguous() for d in deltas],
        None if masks is None else masks.contiguous(),
        factors.float().contiguous(),
        out,
        experts=experts,
        add_base=add_base,
        elect=elect,
        normalize=normalize,
        least=least,
        scaling=scaling,
    )
    return out


def _fake(deltas, factors, masks, base, experts, add_base, elect, normalize, least, scaling, dtype):
    _check(deltas, factors, masks, base, experts, add_base, elect, normalize)
    first = deltas[0] if base is None else base
    return first.new_empty(first.shape, dtype=dtype or first.dtype)


register(
    "masked_merge(Tensor[] deltas, Tensor factors, Tensor? masks, Tensor? base, bool experts, "
    "bool add_base, bool elect, bool normalize, float least, float scaling, ScalarType? dtype) "
    "-> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_no_gradient("masked_merge")


def _check_sums(deltas, masks, base, width):
    check_source("masked_sums", deltas, base)
    _check_masks("masked_sums", deltas, masks)
    check_width("masked_sums", deltas[0], width)


def _sums_reference(deltas, masks, base, width, square):
    _check_sums(deltas, masks, base, width)
    dtype = accumulate_dtype(deltas[0], base)
    halves = []
    for chosen in (None, masks):
        rows = [
            lane_sums((x.double().square() if square else x.double().abs()).reshape(-1), width)
            for x in _masked(deltas, chosen, base, base is not None, dtype)
        ]
        halves.append(torch.stack(rows, 1))
    return torch.stack(halves, 1)


def lane_sums(values: Tensor, width: int) -> Tensor:
    """Sums fp64 [rows] of rows of `width` values [n] in the kernels' order.

    Sixteen lanes are summed from the start of each row, then folded by halves.
    """
    rows = values.numel() // width
    padded = torch.nn.functional.pad(values.view(rows, width), (0, -width % 16))
    padded = padded.view(rows, (width + 15) // 16, 16)
    total = torch.zeros(rows, 16, dtype=values.dtype, device=values.device)
    for step in range(padded.shape[1]):
        total = total + padded[:, step]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def _sums_compiled(deltas, masks, base, width, square):
    kernels = native_kernels("masked_sums", *deltas[:1], base)
    if kernels is None:
        return _sums_reference(deltas, masks, base, width, square)
    sums = _sums_fake(deltas, masks, base, width, square)
    kernels.masked_sums(
        None if base is None else base.contiguous(),
        [d.contiguous() for d in deltas],
        None if masks is None else masks.contiguous(),
        sums,
        width,
        square,
    )
    return sums


def _sums_fake(deltas, masks, base, width, square):
    _check_sums(deltas, masks, base, width)
    return deltas[0].new_empty((deltas[0].numel() // width, 2, len(deltas)), dtype=torch.float64)


register(
    "masked_sums(Tensor[] deltas, Tensor? masks, Tensor? base, int width, bool square) -> Tensor",
    reference=_sums_reference,
    compiled=_sums_compiled,
    fake=_sums_fake,
)
register_no_gradient("masked_sums")
