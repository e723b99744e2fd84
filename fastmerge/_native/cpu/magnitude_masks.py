"""`magnitude_masks` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from . import calls


def magnitude_masks(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    values: Tensor,
    indices: Tensor,
    masks: Tensor,
    offset: int,
) -> None:
    """Write which entries lie between two cuts of the order of magnitudes as packed bits.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        values, indices: fp32 and int64 [K, 2], the upper and the lower cut.
        masks: uint8 [K, ceil(n / 8)].
        offset: index of the first entry in the whole tensor.
    """
    extensions.cpu.magnitude_masks(
        calls.task_vectors(base, deltas, base is not None),
        values.data_ptr(),
        indices.data_ptr(),
        masks.data_ptr(),
        deltas[0].numel(),
        offset,
        torch.get_num_threads(),
    )


def tie_counts(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    values: Tensor,
    starts: Tensor,
    counts: Tensor,
    width: int,
    offset: int,
) -> None:
    """Add to `counts` how many entries equal a magnitude, by their index.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        values, starts: fp32 and int64 [K], the magnitude and the first index counted.
        counts: int64 [K, bins], added to.
        width: indices of one bin.
        offset: index of the first entry in the whole tensor.
    """
    extensions.cpu.tie_counts(
        calls.task_vectors(base, deltas, base is not None),
        values.data_ptr(),
        starts.data_ptr(),
        counts.data_ptr(),
        deltas[0].numel(),
        offset,
        width,
        counts.shape[1],
        torch.get_num_threads(),
    )
