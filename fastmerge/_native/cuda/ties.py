"""`ties` on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import code, one_dtype
from . import calls


def ties_merge(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    thresholds: Tensor,
    out: Tensor,
    *,
    experts: bool = False,
    mode: int = 0,
    scaling: float = 1.0,
    majority: int | None = 0,
    add_base: bool = False,
) -> Tensor:
    """As the CPU's, with K <= 256; a majority of None never waits for the host."""
    deltas = one_dtype(deltas)
    stats = torch.empty(2, dtype=torch.int64, device=out.device)
    extensions.cuda.ties_merge(
        calls.place(out),
        calls.tensors([base], deltas, [out], experts),
        thresholds.data_ptr(),
        out.data_ptr(),
        code([out]),
        stats.data_ptr(),
        mode,
        scaling,
        majority,
        add_base,
    )
    return stats


def ties_masks(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    thresholds: Tensor,
    masks: Tensor,
    *,
    experts: bool = False,
    majority: int | None = 0,
) -> Tensor:
    """As the CPU's, with K <= 256; a majority of None never waits for the host."""
    deltas = one_dtype(deltas)
    stats = torch.empty(2, dtype=torch.int64, device=masks.device)
    extensions.cuda.ties_masks(
        calls.place(masks),
        calls.tensors([base], deltas, deltas[:1], experts),
        thresholds.data_ptr(),
        masks.data_ptr(),
        stats.data_ptr(),
        majority,
    )
    return stats
