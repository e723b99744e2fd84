"""`elect` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import code
from . import calls


def elect(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    unified: Tensor,
    masks: Tensor,
    shape: tuple[int, int],
    leave_out: bool,
) -> Tensor:
    """Write the unified vector and the packed masks, as `ElectParams` says.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        unified: tensor of that size.
        masks: uint8 [K, rows, ceil(columns / 8)].
        shape: (rows, columns) of the tensors.
        leave_out: whether entries that add up to 0 stay out.

    Returns:
        fp64 [2, K]: the sums of |tau_k|, and of |unified| where mask_k.
    """
    count = len(deltas)
    magnitudes = calls.doubles(2 * count).view(2, count)
    scratch = calls.doubles(extensions.cpu.mask_scratch_doubles(*shape, 2 * count))
    extensions.cpu.elect(
        calls.task_vectors(base, deltas, base is not None),
        unified.data_ptr(),
        masks.data_ptr(),
        magnitudes.data_ptr(),
        scratch.data_ptr(),
        *shape,
        code([unified]),
        leave_out,
        torch.get_num_threads(),
    )
    return magnitudes
