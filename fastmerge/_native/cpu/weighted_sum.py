"""`weighted_sum` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import addresses, code, flattened, one_dtype


def weighted_sum(
    bases: Sequence[Tensor],
    deltas: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    outs: Sequence[Tensor],
    experts: bool = False,
) -> None:
    """Write bases[l] + sum_k coefficients[l, k] * tau_lk into outs[l], in fp32, rounded once.

    Args:
        bases: L tensors of one dtype.
        deltas: L lists of K tensors; tau = delta - base with `experts`, else tau = delta.
        coefficients: fp32 [L, K].
        outs: L tensors of one dtype; outs[l] may be bases[l].
        experts: whether deltas are fine-tuned weights.
    """
    count = len(deltas[0]) if deltas else 0
    bases = one_dtype(bases)
    flat = flattened(deltas)
    extensions.cpu.weighted_sum(
        addresses(bases),
        addresses(flat),
        coefficients.data_ptr(),
        addresses(outs),
        [out.numel() for out in outs],
        count,
        code(bases),
        code(flat),
        code(outs),
        experts,
        torch.get_num_threads(),
    )
