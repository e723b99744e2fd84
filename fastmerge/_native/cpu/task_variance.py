"""`task_variance` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from . import calls


def task_variance(base: Tensor | None, deltas: Sequence[Tensor], out: Tensor) -> None:
    """Write the variance over the K task vectors of every entry.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        out: fp32 tensor of that size.
    """
    extensions.cpu.task_variance(
        calls.task_vectors(base, deltas, base is not None),
        out.data_ptr(),
        out.numel(),
        torch.get_num_threads(),
    )
