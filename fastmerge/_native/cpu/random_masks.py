"""`random_masks` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from . import calls


def random_masks(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    probabilities: Tensor,
    masks: Tensor,
    width: int,
    key: int,
    offset: int,
) -> None:
    """Write randomly kept entries as packed bits.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        probabilities: fp64 [K, 2], of the smallest and of the largest magnitude of a row.
        masks: uint8 [K, ceil(n / 8)].
        width: entries of one row.
        key: 64 bits.
        offset: index of the first entry in the whole tensor.
    """
    ranked = bool((probabilities[:, 0] != probabilities[:, 1]).any())
    room = extensions.cpu.rank_scratch_bytes(width) if ranked else 0
    scratch = torch.empty(len(deltas) * room, dtype=torch.uint8)
    extensions.cpu.random_masks(
        calls.task_vectors(base, deltas, base is not None),
        probabilities.data_ptr(),
        masks.data_ptr(),
        scratch.data_ptr(),
        key % (1 << 64),
        deltas[0].numel(),
        offset,
        width,
        torch.get_num_threads(),
    )
