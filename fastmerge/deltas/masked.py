"""Deltas stored as one unified task vector and one bit an entry for each task."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..ops._bits import mask_rows, pack_bits, pack_rows, packed_shape, unpack_bits, unpack_rows
from ._format import Deltas


class Masked(Deltas):
    """Task vectors tau_k = mask_k * unified; a task's scale is left to its coefficient.

    Masks are packed row by row: a row is one index of the first dimension with all others
    flattened, or the whole tensor for fewer than two dimensions. Entry i of a row is bit i % 8 of
    byte i // 8; unused bits are 0.

    Args:
        unified: [*], the unified task vector.
        masks: uint8 [K, rows, ceil(columns / 8)], as `ops.elect` gives and `pack` makes them.

    Raises:
        ValueError: the shape or dtype of masks does not fit unified.

    Source: EMR-Merging (arXiv 2405.17461); TALL masks (arXiv 2405.07813).
    """

    def __init__(self, unified: Tensor, masks: Tensor):
        expected = packed_shape(unified.shape)
        if masks.dtype != torch.uint8 or masks.dim() != 3 or tuple(masks.shape[1:]) != expected:
            raise ValueError(
                f"Masked: masks is {masks.dtype} {list(masks.shape)}, expected torch.uint8 "
                f"[K, {expected[0]}, {expected[1]}] for unified {list(unified.shape)}"
            )
        self.unified, self.masks = unified, masks

    @classmethod
    def pack(cls, unified: Tensor, masks: Tensor) -> Masked:
        """The format from masks that are bool [K, *] like unified [*]."""
        if masks.dtype != torch.bool or masks.shape[1:] != unified.shape:
            raise ValueError(
                f"Masked.pack: masks is {masks.dtype} {list(masks.shape)}, expected torch.bool "
                f"[K, *{list(unified.shape)}] as unified"
            )
        return cls(unified, pack_rows(masks))

    def __len__(self) -> int:
        return self.masks.shape[0]

    def nbytes(self) -> int:
        return self.unified.nbytes + self.masks.nbytes

    def unpacked(self) -> Tensor:
        """The masks as bool [K, *]."""
        return unpack_rows(self.masks, self.unified.shape)

    def rows(self, start: int, stop: int) -> Masked:
        if self.unified.dim() >= 2:
            return Masked(self.unified[start:stop], self.masks[:, start:stop])
        return self._vector(self.unified[start:stop], self.masks, start)

    def entry(self, index: int) -> Masked:
        unified = self.unified[index]
        if self.unified.dim() < 2:
            return self._vector(unified, self.masks, index % self.unified.numel())
        masks = self.masks[:, index]  # [K, bytes], the rows of `unified` one after the other
        if self.unified.dim() == 2:
            return Masked(unified, masks.unsqueeze(1))
        rows, columns = mask_rows(unified.shape)
        if columns % 8 == 0:
            return Masked(unified, masks.reshape(len(self), rows, columns // 8))
        bits = unpack_bits(masks, unified.numel()).view(len(self), rows, columns)
        return Masked(unified, pack_bits(bits))

    def gather(self, ids: Tensor) -> Masked:
        unified = self.unified.index_select(0, ids)
        if self.unified.dim() >= 2:
            return Masked(unified, self.masks.index_select(1, ids))
        bits = unpack_bits(self.masks, self.unified.numel())
        return Masked(unified, pack_bits(bits.index_select(-1, ids)))

    def flat(self) -> Masked:
        return Masked(self.unified.flatten(1), self.masks)

    def task_vectors(self, base: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        for mask in self.unpacked():
            yield torch.where(mask, self.unified.to(dtype), 0)

    def weighted_sum(
        self, base: Tensor, coefficients: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        return ops.masked_weighted_sum(base, self.unified, self.masks, coefficients, dtype=dtype)

    def merged_linear(
        self,
        x: Tensor,
        base: Tensor,
        coefficients: Tensor,
        bias: Tensor | None = None,
        transpose: bool = False,
    ) -> Tensor:
        return ops.masked_linear(
            x, base, self.unified, self.masks, coefficients, bias, transpose=transpose
        )

    def coefficient_grad(self, grad_weight: Tensor, base: Tensor | None = None) -> Tensor:
        return ops.masked_coefficient_grad(grad_weight, self.unified, self.masks)

    def _vector(self, unified: Tensor, masks: Tensor, start: int) -> Masked:
        """Entries of a vector from `start` on; a view where they begin and end with a byte."""
        stop, size = start + unified.numel(), self.unified.numel()
        if start % 8 == 0 and (stop % 8 == 0 or stop == size):
            return Masked(unified, masks[..., start // 8 : (stop + 7) // 8])
        return Masked(unified, pack_bits(unpack_bits(masks, size)[..., start:stop]))
