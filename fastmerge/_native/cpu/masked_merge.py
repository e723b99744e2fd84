"""`masked_merge` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address, code
from . import calls


def masked_merge(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    masks: Tensor | None,
    factors: Tensor,
    out: Tensor,
    *,
    experts: bool,
    add_base: bool,
    elect: bool,
    normalize: bool,
    least: float,
    scaling: float,
) -> None:
    """Write the merge of masked task vectors into `out`, as `MaskedMergeParams` says.

    Args:
        base: needed with `experts` or `add_base`.
        deltas: K tensors of one size.
        masks: uint8 [1 or K, ceil(n / 8)], or None for all entries.
        factors: fp32 [3, K]: votes, values and weights.
        out: tensor of that size; may be base.
    """
    extensions.cpu.masked_merge(
        calls.task_vectors(base, deltas, experts),
        address(masks),
        mask_stride(masks),
        factors.data_ptr(),
        out.data_ptr(),
        out.numel(),
        code([out]),
        elect,
        normalize,
        add_base,
        least,
        scaling,
        torch.get_num_threads(),
    )


def masked_sums(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    masks: Tensor | None,
    sums: Tensor,
    width: int,
    square: bool,
) -> None:
    """Write the sums of |tau_k| or its square along rows, over all and over masked entries.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        masks: as in `masked_merge`.
        sums: fp64 [rows, 2, K].
        width: entries of one row.
    """
    extensions.cpu.masked_sums(
        calls.task_vectors(base, deltas, base is not None),
        address(masks),
        mask_stride(masks),
        sums.data_ptr(),
        deltas[0].numel(),
        width,
        square,
        torch.get_num_threads(),
    )


def mask_stride(masks: Tensor | None) -> int:
    return 0 if masks is None or masks.shape[0] == 1 else masks.shape[1]
