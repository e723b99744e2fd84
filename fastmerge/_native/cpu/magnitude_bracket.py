"""`magnitude_bracket` on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address, code


def magnitude_bracket(
    base: Tensor | None,
    delta: Tensor,
    low: int,
    shift: int,
    counts: Tensor,
    experts: bool = False,
) -> None:
    """Add to `counts` how many magnitudes |tau| are below, in the bins of, and above a bracket.

    With u the 31 bits of fp32 |tau|: counts[0] counts u < low, counts[1 + j] those with
    (u - low) >> shift = j, the last one the rest.

    Args:
        base, delta: tensors of one size; base may be None without `experts`.
        low, shift: the bracket.
        counts: int64 [bins + 2], added to.
        experts: whether delta holds fine-tuned weights.
    """
    extensions.cpu.magnitude_bracket(
        address(base if experts else None),
        delta.data_ptr(),
        delta.numel(),
        code([base] if experts else []),
        code([delta]),
        experts,
        low,
        shift,
        counts.numel() - 2,
        counts.data_ptr(),
        torch.get_num_threads(),
    )
