"""`elect`: the unified task vector of EMR-Merging and the packed masks of the tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._native.memory import fresh
from ..backends import native_kernels
from ._bits import mask_rows, pack_rows, packed_shape
from ._library import (
    accumulate_dtype,
    as_task_vector,
    check_float,
    check_source,
    register,
    register_no_gradient,
    unpack_deltas,
)

CANCELLED = ("negative", "zero")


class Elected(NamedTuple):
    """What `elect` finds for one tensor.

    Attributes:
        unified: [*], the unified task vector.
        masks: uint8 [K, rows, bytes], see `elect`.
        magnitudes: fp64 [2, K]: the sums of |tau_k|, and of |unified| where mask_k.
    """

    unified: Tensor
    masks: Tensor
    magnitudes: Tensor


def elect(
    deltas: object,
    *,
    base: Tensor | None = None,
    cancelled: str = "negative",
    dtype: torch.dtype | None = None,
) -> Elected:
    """Elect a sign per entry, keep its largest magnitude, and mark the tasks that agree.

    gamma = + where sum_k tau_k > 0, else -;  unified = gamma max_k |tau_k| over the tau_k of sign
    gamma, 0 if there are none;  mask_k = tau_k has the sign gamma. Signs are compared, never
    multiplied, so nothing underflows. The sum runs in the order of k, in fp32 (fp64 for fp64).

    Args:
        deltas: K tensors [*] of one dtype (task vectors), or a delta format.
        base: [*], needed by the format `Experts`, where tau_k = expert_k - base.
        cancelled: what becomes of entries whose tau_k add up to exactly 0: "negative" elects the
            sign - as for sums below 0 (the published code), "zero" leaves them out: unified and
            masks are 0 there (sgn(0) = 0 as the paper has it).
        dtype: dtype of unified, by default the deltas'.

    Returns:
        unified [*]; masks, uint8 [K, rows, ceil(columns / 8)] with one row for each index of the
        first dimension (one row in all for fewer than two dimensions): entry i of a row is bit
        i % 8 of byte i // 8, unused bits are 0; and the fp64 sums [2, K] of |tau_k| and of
        mask_k |unified|, of which the rescalers are ratios. A NaN takes no part in the election
        and is in no mask, but makes its task's first sum NaN; inf - inf elects the sign -.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.
        ValueError: `cancelled` is unknown, or experts without their base.

    Source: EMR-Merging (arXiv 2405.17461), section 3.2.
    """
    if cancelled not in CANCELLED:
        raise ValueError(f"elect: cancelled must be one of {', '.join(CANCELLED)}: {cancelled!r}")
    tensors, experts = unpack_deltas(deltas)
    if experts and base is None:
        raise ValueError("elect: deltas of format Experts need base")
    origin = base if experts else None
    return Elected(*torch.ops.fastmerge.elect(tensors, origin, cancelled == "zero", dtype))


def _task_vectors(deltas, base, dtype):
    """The tau_k one after the other."""
    for delta in deltas:
        yield as_task_vector(base, delta, base is not None, dtype)


def _reference(deltas, base, leave_out, dtype):
    check_source("elect", deltas, base)
    accumulate = accumulate_dtype(deltas[0], base)
    total = torch.zeros(deltas[0].shape, dtype=accumulate, device=deltas[0].device)
    largest, smallest = torch.zeros_like(total), torch.zeros_like(total)
    for tau in _task_vectors(deltas, base, accumulate):
        tau = torch.where(tau.isnan(), 0, tau)
        total += tau
        largest, smallest = torch.maximum(largest, tau), torch.minimum(smallest, tau)
    up, down = total > 0, ~(total > 0)
    if leave_out:
        down &= total != 0
    unified = torch.where(up, largest, torch.where(down, smallest, 0))
    unified = unified.to(dtype or deltas[0].dtype)
    masks, magnitudes = [], []
    for tau in _task_vectors(deltas, base, accumulate):
        mask = (up & (tau > 0)) | (down & (tau < 0))
        kept = torch.where(mask, unified, 0)
        masks.append(pack_rows(mask.unsqueeze(0)))
        magnitudes.append(torch.stack([x.abs().sum(dtype=torch.float64) for x in (tau, kept)]))
    return unified, torch.cat(masks), torch.stack(magnitudes, 1)


def _compiled(deltas, base, leave_out, dtype):
    unified, masks, _ = _fake(deltas, base, leave_out, dtype)
    kernels = native_kernels("elect", unified, deltas[0], base)
    if kernels is None:
        return _reference(deltas, base, leave_out, dtype)
    magnitudes = kernels.elect(
        None if base is None else base.contiguous(),
        [d.contiguous() for d in deltas],
        unified,
        masks,
        mask_rows(unified.shape),
        leave_out,
    )
    return unified, masks, magnitudes


def _fake(deltas, base, leave_out, dtype):
    check_source("elect", deltas, base)
    if dtype is not None:
        check_float("elect", "unified", deltas[0].new_empty(0, dtype=dtype))
    first = deltas[0]
    shape = (len(deltas), *packed_shape(first.shape))
    return (
        fresh(first, dtype or first.dtype),
        first.new_empty(shape, dtype=torch.uint8),
        first.new_empty((2, len(deltas)), dtype=torch.float64),
    )


register(
    "elect(Tensor[] deltas, Tensor? base, bool leave_out, ScalarType? dtype) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_no_gradient("elect")
