"""Packed masks: entry i of a row is bit i % 8 of byte i // 8, unused bits are 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Bool [..., n] as uint8 [..., ceil(n / 8)]."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    columns = (*mask.shape[:-1], padded.shape[-1] // 8, 8)
    return (padded.view(columns) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(masks: Tensor, size: int) -> Tensor:
    """uint8 [..., ceil(n / 8)] as bool [..., n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=masks.device)
    return ((masks.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :size].bool()


def mask_rows(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) in which the masks of a tensor are packed: each row starts a byte.

    A row is one index of the first dimension; tensors of one dimension or none are one row.
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, bytes of one row) of the packed mask of a tensor."""
    rows, columns = mask_rows(shape)
    return rows, (columns + 7) // 8


def pack_rows(masks: Tensor) -> Tensor:
    """Bool [K, *] as uint8 [K, rows, bytes], see `mask_rows`."""
    return pack_bits(masks.reshape(masks.shape[0], *mask_rows(masks.shape[1:])))


def unpack_rows(masks: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8 [K, rows, bytes] as bool [K, *shape]."""
    return unpack_bits(masks, mask_rows(shape)[1]).view(masks.shape[0], *shape)
