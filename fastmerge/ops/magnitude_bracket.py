"""`magnitude_bracket`: how many magnitudes are below, inside and above a bracket, by bins.

A sample says about where a wanted rank is; a bracket around it then confirms the exact magnitude
in a single read, since the counts below and above say whether the rank was caught.
"""

from __future__ import annotations

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

MAX_BITS = (1 << 31) - 1  # of an fp32 magnitude


def magnitude_bracket(
    delta: Tensor, low: int, *, shift: int = 0, bins: int = 1 << 16, base: Tensor | None = None
) -> Tensor:
    """Counts of magnitudes below, in the bins of, and above a bracket.

    With u the 31 bits of fp32 |tau|, ordered like |tau|: counts[0] = #(u < low), counts[1 + j] =
    #(u >= low and (u - low) >> shift = j), counts[1 + bins] = the rest. A NaN is above all.

    Args:
        delta: [*], fp32, fp16 or bf16.
        low: first bits of the bracket, 0 <= low < 2^31.
        shift: bits of width of a bin, 0 to 30.
        bins: number of bins, >= 1.
        base: [*] like delta; delta is then the expert's weights, tau = delta - base.

    Returns:
        int64 [bins + 2].

    Raises:
        RuntimeError: shapes, dtypes or devices do not match, or a number is out of range.
    """
    return torch.ops.fastmerge.magnitude_bracket(delta, base, low, shift, bins)


def _check(delta, base, low, shift, bins):
    op = "magnitude_bracket"
    check_magnitudes(op, delta, base)
    check(
        accumulate_dtype(delta, base) == torch.float32,
        lambda: f"{op}: fp64 tensors are not supported",
    )
    check(0 <= low <= MAX_BITS, lambda: f"{op}: low {low}, expected 0..{MAX_BITS}")
    check(0 <= shift <= 30, lambda: f"{op}: shift {shift}, expected 0..30")
    check(1 <= bins <= MAX_BITS, lambda: f"{op}: bins {bins}, expected 1..{MAX_BITS}")


def _reference(delta, base, low, shift, bins):
    _check(delta, base, low, shift, bins)
    tau = as_task_vector(base, delta, base is not None, torch.float32).abs().flatten()
    tau = torch.where(tau.isnan(), torch.nan, tau)  # one NaN
    above = tau.view(torch.int32).long() - low
    places = torch.where(above < 0, 0, 1 + (above >> shift).clamp_max(bins))
    return torch.bincount(places, minlength=bins + 2)


def _compiled(delta, base, low, shift, bins):
    kernels = native_kernels("magnitude_bracket", delta, base)
    if kernels is None:
        return _reference(delta, base, low, shift, bins)
    _check(delta, base, low, shift, bins)
    counts = torch.zeros(bins + 2, dtype=torch.int64)
    kernels.magnitude_bracket(
        None if base is None else base.contiguous(),
        delta.contiguous(),
        low,
        shift,
        counts,
        base is not None,
    )
    return counts


def _fake(delta, base, low, shift, bins):
    _check(delta, base, low, shift, bins)
    return delta.new_empty(bins + 2, dtype=torch.int64)


register(
    "magnitude_bracket(Tensor delta, Tensor? base, int low, int shift, int bins) -> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_no_gradient("magnitude_bracket")
