"""Packed masks: entry i of a tensor is bit i % 8 of byte i // 8, unused bits are 0."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Bool [n] as uint8 [ceil(n / 8)]."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(masks: Tensor, size: int) -> Tensor:
    """uint8 [..., ceil(n / 8)] as bool [..., n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=masks.device)
    return ((masks.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :size].bool()
