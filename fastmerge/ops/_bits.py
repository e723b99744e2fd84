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


def set_bits(mask: Tensor) -> Tensor:
    """Indices of the set entries of one packed mask uint8 [ceil(n / 8)], in order."""
    used = mask.nonzero().squeeze(1)
    bits = unpack_bits(mask[used].unsqueeze(-1), 8)  # [used, 8]
    row, bit = bits.nonzero(as_tuple=True)
    return used[row] * 8 + bit


def count_words(mask: Tensor) -> Tensor:
    """How many of each 64 entries are set, int64 [ceil(n / 64)], of a mask uint8 [ceil(n / 8)]."""
    words = torch.nn.functional.pad(mask, (0, -mask.numel() % 8)).view(torch.int64)
    pairs = words - ((words >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((octets * 0x0101010101010101) >> 56) & 0x7F
