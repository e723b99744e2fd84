"""`magnitude_histogram` on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address, code


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
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, extensions.cpu.histogram_bins, dtype=torch.int64)
    extensions.cpu.magnitude_histogram(
        address(base if experts else None),
        delta.data_ptr(),
        delta.numel(),
        code([base] if experts else []),
        code([delta]),
        experts,
        level,
        prefix,
        counts.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
