"""TIES-Merging as published, on whole rows in the dtype they come in."""

from __future__ import annotations

import torch
from torch import Tensor


def ties_oracle(rows: Tensor, density: float, merge: str) -> tuple[Tensor, Tensor, int]:
    """Trim every task vector, elect signs for all entries, merge what agrees.

    Args:
        rows: [K, D] task vectors, whole model flattened.
        density: fraction kept.
        merge: "mean", "sum" or "max".

    Returns:
        The merged task vector [D], the entries that took part [K, D], and the number of entries
        whose kept values cancelled exactly.
    """
    entries = rows.shape[1]
    trimmed = torch.zeros_like(rows)
    for row, target in zip(rows, trimmed, strict=True):
        if entries:
            k = max(1, entries - int(entries * density))
            smallest_kept = torch.kthvalue(row.abs(), k).values
            target[:] = row * (row.abs() >= smallest_kept)
    sums = trimmed.sum(0)
    signs = torch.sign(sums)
    majority = torch.sign(signs.sum())
    cancelled = (signs == 0) & (trimmed != 0).any(0)
    signs[signs == 0] = majority
    agree = torch.where(signs > 0, trimmed > 0, trimmed < 0)
    selected = trimmed * agree
    if merge == "mean":
        merged = selected.sum(0) / (selected != 0).sum(0).clamp(min=1)
    elif merge == "sum":
        merged = selected.sum(0)
    else:
        merged = selected.abs().amax(0) * signs
    return merged, agree, int(cancelled.sum())
