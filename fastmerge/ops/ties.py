"""`ties`: trim, elect and disjoint merge of TIES-Merging with all K values of an entry at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native.memory import fresh
from ..backends import native_kernels
from ._bits import pack_bits
from ._library import (
    accumulate_dtype,
    as_task_vector,
    check,
    check_deltas,
    check_float,
    register,
    register_no_gradient,
    unpack_deltas,
)
from .magnitude_threshold import magnitude_threshold

MERGES = ("mean", "sum", "max")


def ties_merge(
    deltas: object,
    *,
    density: float = 0.2,
    thresholds: Tensor | None = None,
    base: Tensor | None = None,
    scaling: float = 1.0,
    merge: str = "mean",
    majority: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """TIES-Merging of K task vectors: trim, elect a sign per entry, merge the entries that agree.

    x_k = tau_k where |tau_k| >= c_k, else 0;  s = sign(sum_k x_k), the majority where that is 0;
    m = mean, sum or largest of the non-zero x_k with sign s;  out = base + scaling * m.

    The whole of `deltas` is one model here. For a model of several tensors pass the `thresholds`
    and the `majority` of all of them.

    Args:
        deltas: K tensors [*] of one dtype (task vectors), or a delta format.
        density: fraction of entries kept per task vector, 0 < density <= 1; not read when
            thresholds are given.
        thresholds: [K] smallest magnitudes kept, by default `magnitude_threshold` of each delta.
        base: [*], added to the result; needed by the format `Experts`.
        scaling: factor of the merged task vector.
        merge: "mean" over the entries that agree, their "sum", or "max", the largest magnitude.
        majority: sign for entries whose kept values cancel exactly: -1, 0 (treated as negative)
            or 1. By default the sign of the sum of all elected signs, which on CUDA stays on
            the device: the call does not wait and can be captured in a graph.
        out: [*] tensor of any floating dtype to write to, which may not be base or a delta.

    Returns:
        [*] merged weight in base's dtype, or merged task vector in the deltas' if base is None;
        `out` if it was given. A NaN is below every threshold and is trimmed.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.
        ValueError: density out of range, experts without their base, or out is an input.

    Source: TIES-Merging (arXiv 2306.01708), algorithm 1. The paper's defaults are kept; later
    vision code bases use merge="sum" with scaling=0.3.
    """
    tensors, experts = unpack_deltas(deltas)
    thresholds = _thresholds("ties_merge", tensors, experts, base, density, thresholds)

    if out is None:
        first = tensors[0] if base is None else base
        out = fresh(first, first.dtype)
    elif any(out is t for t in (base, *tensors)):
        raise ValueError("ties_merge: out must not be base or a delta, which are read twice")

    torch.ops.fastmerge.ties_merge_out(
        out, tensors, thresholds, base, experts, base is not None, merge, scaling, majority
    )
    return out


def ties_masks(
    deltas: object,
    *,
    density: float = 0.2,
    thresholds: Tensor | None = None,
    base: Tensor | None = None,
    majority: int | None = None,
) -> Tensor:
    """Entries of each task vector that survive trimming and agree with the elected sign.

    mask_k = x_k > 0 where s > 0, x_k < 0 elsewhere, with x and s of `ties_merge`.

    Args:
        deltas: K tensors [*] with n entries, of one dtype (task vectors), or a delta format.
        density: as in `ties_merge`.
        thresholds: as in `ties_merge`.
        base: [*], needed by the format `Experts`.
        majority: as in `ties_merge`.

    Returns:
        uint8 [K, ceil(n / 8)]: entry i is bit i % 8 of byte i // 8, unused bits are 0.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.
        ValueError: density out of range, or experts without their base.

    Source: TIES-Merging (arXiv 2306.01708); AdaMerging++ (arXiv 2310.02575) learns on these.
    """
    tensors, experts = unpack_deltas(deltas)
    thresholds = _thresholds("ties_masks", tensors, experts, base, density, thresholds)

    masks, _ = torch.ops.fastmerge.ties_masks(
        tensors, thresholds, base if experts else None, experts, majority
    )
    return masks


def majority_sign(election: Tensor) -> int:
    """Sign that decides the exact cancellations of a model; 0 when there are none.

    Args:
        election: int64 [2], the second result of the ops, summed over the model: the sum of the
            elected signs, and the number of entries whose kept values cancel exactly.
    """
    signs, cancellations = election.tolist()
    return (signs > 0) - (signs < 0) if cancellations else 0


def _thresholds(op, tensors, experts, base, density, thresholds):
    check(len(tensors) > 0, lambda: f"{op}: deltas is empty, expected K >= 1 tensors")
    if experts and base is None:
        raise ValueError(f"{op}: deltas of format Experts need base")
    if thresholds is not None:
        return thresholds
    origin = base if experts else None
    return torch.stack([magnitude_threshold(t, density=density, base=origin) for t in tensors])


def _check(op, deltas, thresholds, base, experts, majority):
    check(len(deltas) > 0, lambda: f"{op}: deltas is empty, expected K >= 1 tensors")
    first = deltas[0] if base is None else base
    check_deltas(op, first, deltas, base_name="deltas[0]" if base is None else "base")
    check_float(op, "thresholds", thresholds)
    check(
        list(thresholds.shape) == [len(deltas)] and thresholds.device == first.device,
        lambda: (
            f"{op}: thresholds is {list(thresholds.shape)} on {thresholds.device}, "
            f"expected [{len(deltas)}] on {first.device}, one per delta"
        ),
    )
    check(base is not None or not experts, lambda: f"{op}: experts need base")
    check(majority in (None, -1, 0, 1), lambda: f"{op}: majority must be -1, 0 or 1: {majority}")


def _check_merge(deltas, thresholds, base, experts, add_base, merge, majority):
    _check("ties_merge", deltas, thresholds, base, experts, majority)
    check(base is not None or not add_base, lambda: "ties_merge: add_base needs base")
    check(
        merge in MERGES,
        lambda: f"ties_merge: merge must be one of {', '.join(MERGES)}, got {merge!r}",
    )


def _trimmed(deltas, thresholds, base, experts, accumulate):
    """The rows x_k one after the other, so that one fp32 task vector exists at a time."""
    for delta, threshold in zip(deltas, thresholds.to(accumulate).unbind(), strict=True):
        tau = as_task_vector(base, delta, experts, accumulate)
        yield torch.where(tau.abs() >= threshold, tau, 0)


def _check_out(out, deltas):
    check_float("ties_merge", "out", out)
    check(
        out.shape == deltas[0].shape and out.device == deltas[0].device,
        lambda: (
            f"ties_merge: out is {list(out.shape)} on {out.device}, "
            f"expected {list(deltas[0].shape)} on {deltas[0].device}"
        ),
    )


def _elect(rows, majority):
    """Elected sign of each entry, and the election's statistics (see `majority_sign`).

    A majority of None is found like `majority_sign` does, without the host.
    """
    total, any_kept = 0, False
    for x in rows:
        total = total + x
        any_kept = any_kept | (x != 0)
    sign = (total > 0).to(torch.int8) - (total < 0).to(torch.int8)  # [*]
    cancelled = (total == 0) & any_kept
    election = torch.stack([sign.sum(dtype=torch.int64), cancelled.sum()])
    if majority is None:
        majority = torch.where(election[1] > 0, election[0].sign(), 0).to(sign.dtype)
    return torch.where(sign == 0, majority, sign), election


def _out_reference(out, deltas, thresholds, base, experts, add_base, merge, scaling, majority):
    _check_merge(deltas, thresholds, base, experts, add_base, merge, majority)
    _check_out(out, deltas)
    accumulate = accumulate_dtype(deltas[0], base, thresholds)
    arguments = (deltas, thresholds, base, experts, accumulate)
    sign, election = _elect(_trimmed(*arguments), majority)
    merged = torch.zeros(deltas[0].shape, dtype=accumulate, device=deltas[0].device)
    count = torch.zeros_like(merged)
    for x in _trimmed(*arguments):
        selected = torch.where(sign > 0, x > 0, x < 0)
        if merge == "max":
            merged = torch.where(selected, torch.maximum(merged, x.abs()), merged)
        else:
            merged += torch.where(selected, x, 0)
        count += selected
    if merge == "mean":
        merged /= count.clamp(min=1)
    elif merge == "max":
        merged *= sign
    merged *= scaling
    if add_base:
        merged += base.to(accumulate)
    out.copy_(merged)
    return election


def _out_compiled(out, deltas, thresholds, base, experts, add_base, merge, scaling, majority):
    kernels = native_kernels("ties_merge", out, *deltas[:1], base, thresholds)
    if kernels is None:
        return _out_reference(
            out, deltas, thresholds, base, experts, add_base, merge, scaling, majority
        )
    _check_merge(deltas, thresholds, base, experts, add_base, merge, majority)
    _check_out(out, deltas)
    target = out if out.is_contiguous() else out.new_empty(out.shape)
    election = kernels.ties_merge(
        None if base is None else base.contiguous(),
        [d.contiguous() for d in deltas],
        thresholds.float().contiguous(),
        target,
        experts=experts,
        mode=MERGES.index(merge),
        scaling=scaling,
        majority=majority,
        add_base=add_base,
    )
    if target is not out:
        out.copy_(target)
    return election


def _out_fake(out, deltas, thresholds, base, experts, add_base, merge, scaling, majority):
    _check_merge(deltas, thresholds, base, experts, add_base, merge, majority)
    _check_out(out, deltas)
    return deltas[0].new_empty(2, dtype=torch.int64)


register(
    "ties_merge_out(Tensor(a!) out, Tensor[] deltas, Tensor thresholds, Tensor? base, "
    "bool experts, bool add_base, str merge, float scaling, int? majority) -> Tensor",
    reference=_out_reference,
    compiled=_out_compiled,
    fake=_out_fake,
)


def _masks_reference(deltas, thresholds, base, experts, majority):
    _check("ties_masks", deltas, thresholds, base, experts, majority)
    accumulate = accumulate_dtype(deltas[0], base, thresholds)
    arguments = (deltas, thresholds, base, experts, accumulate)
    sign, election = _elect(_trimmed(*arguments), majority)
    rows = [pack_bits(torch.where(sign > 0, x > 0, x < 0).flatten()) for x in _trimmed(*arguments)]
    return torch.stack(rows), election


def _masks_compiled(deltas, thresholds, base, experts, majority):
    kernels = native_kernels("ties_masks", thresholds, *deltas[:1], base)
    if kernels is None:
        return _masks_reference(deltas, thresholds, base, experts, majority)
    _check("ties_masks", deltas, thresholds, base, experts, majority)
    shape = (len(deltas), (deltas[0].numel() + 7) // 8)
    masks = deltas[0].new_empty(shape, dtype=torch.uint8)
    election = kernels.ties_masks(
        None if base is None else base.contiguous(),
        [d.contiguous() for d in deltas],
        thresholds.float().contiguous(),
        masks,
        experts=experts,
        majority=majority,
    )
    return masks, election


def _masks_fake(deltas, thresholds, base, experts, majority):
    _check("ties_masks", deltas, thresholds, base, experts, majority)
    return (
        deltas[0].new_empty((len(deltas), (deltas[0].numel() + 7) // 8), dtype=torch.uint8),
        deltas[0].new_empty(2, dtype=torch.int64),
    )


register(
    "ties_masks(Tensor[] deltas, Tensor thresholds, Tensor? base, bool experts, int? majority) "
    "-> (Tensor, Tensor)",
    reference=_masks_reference,
    compiled=_masks_compiled,
    fake=_masks_fake,
)
register_no_gradient("ties_masks")
