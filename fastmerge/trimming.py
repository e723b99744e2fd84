"""Trimmed task vectors for coefficient learning (AdaMerging++)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .deltas import Dense, Experts
from .ops._bits import unpack_bits
from .ops.ties import majority_sign


def trim_deltas(
    bases: Mapping[str, Tensor], experts: Mapping[str, Sequence[Tensor]], trim: Mapping[str, Any]
) -> dict[str, Dense]:
    """Task vectors that keep only the entries TIES trims to and elects, over the whole model.

    tau_k <- tau_k * mask_k with the masks of TIES steps 1 to 3, before any aggregation.

    Args:
        bases: {tensor name: [*]} of the base model.
        experts: {tensor name: K tensors [*]} of the experts.
        trim: dict(method="ties", density=fraction kept); density is 0.2 by default.

    Raises:
        ValueError: unknown method or option, or density not in (0, 1].

    Source: AdaMerging++ (arXiv 2310.02575), on TIES-Merging (arXiv 2306.01708).
    """
    options = dict(trim)
    method, density = options.pop("method", None), options.pop("density", 0.2)
    if method != "ties" or options:
        raise ValueError(f"trim must be dict(method='ties', density=...), got {dict(trim)}")
    names = list(bases)
    count = len(experts[names[0]])
    thresholds = torch.stack(
        [
            ops.magnitude_threshold(
                [experts[name][k] for name in names],
                density=density,
                base=[bases[name] for name in names],
            )
            for k in range(count)
        ]
    )
    majority = 0
    while True:
        election = torch.zeros(2, dtype=torch.int64)
        trimmed = {}
        for name in names:
            masks, elected = torch.ops.fastmerge.ties_masks(
                list(experts[name]), thresholds, bases[name], True, majority
            )
            election += elected.cpu()
            trimmed[name] = _masked(bases[name], Experts(experts[name]), masks)
        # entries whose kept values cancel exactly follow the majority of the whole model
        if majority or majority_sign(election) == 0:
            return trimmed
        majority = majority_sign(election)


def _masked(base: Tensor, deltas: Experts, masks: Tensor) -> Dense:
    """Task vectors times their masks; masks are packed bits [K, ceil(n / 8)]."""
    kept = []
    for delta, mask in zip(deltas.tensors, unpack_bits(masks, base.numel()), strict=True):
        tau = delta.to(base.dtype) - base
        kept.append(torch.where(mask.view(base.shape), tau, 0).contiguous())
    return Dense(kept)
