"""Low-rank deltas of experts that share one of the two factors, as L-LoRA's do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops._library import accumulate_dtype
from ._format import Deltas
from .stored import Dense


class SharedDown(Deltas):
    """Task vectors tau_k = up_k down with one down for all.

    Stores r I + K r O numbers. A layer computes x down^T once for all experts and multiplies by
    sum_k lambda_k up_k; the merged change of the weight has rank r whatever K.

    Args:
        down: [r, *] with the weight's trailing dimensions.
        up: K tensors [O, r], in down's dtype.

    Source: L-LoRA (arXiv 2310.04742), where down is A0.
    """

    def __init__(self, down: Tensor, up: Sequence[Tensor]):
        self.down, self.ups = down, Dense(up)
        self._none = torch.zeros_like(self.ups.tensors[0])

    def __len__(self) -> int:
        return len(self.ups)

    def nbytes(self) -> int:
        return self.down.nbytes + self.ups.nbytes()

    def rows(self, start: int, stop: int) -> SharedDown:
        return SharedDown(self.down, self.ups.rows(start, stop).tensors)

    def entry(self, index: int) -> Dense:
        """Written out: an entry of the first dimension has no factors of its own."""
        flat, shape = self.down.flatten(1), self.down.shape[1:]
        return Dense([(up[index] @ flat).view(shape).contiguous() for up in self.ups.tensors])

    def gather(self, ids: Tensor) -> SharedDown:
        return SharedDown(self.down, self.ups.gather(ids).tensors)

    def flat(self) -> SharedDown:
        return SharedDown(self.down.flatten(1), self.ups.tensors)

    def task_vectors(self, base: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        for up in self.ups.tensors:
            yield (up.to(dtype) @ self.down.to(dtype).flatten(1)).view(base.shape)

    def weighted_sum(
        self, base: Tensor, coefficients: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """As `ops.weighted_sum` of one tensor: base + (sum_k coefficients_k up_k) down."""
        accumulate = accumulate_dtype(base, self.down)
        up = ops.weighted_sum(self._none, self.ups, coefficients).to(accumulate)
        total = base.to(accumulate).flatten(1).addmm(up, self.down.to(accumulate).flatten(1))
        return total.view(base.shape).to(dtype or base.dtype)

    def merged_linear(
        self,
        x: Tensor,
        base: Tensor,
        coefficients: Tensor,
        bias: Tensor | None = None,
        transpose: bool = False,
    ) -> Tensor:
        """As `ops.merged_linear`; coefficients [K] or row coefficients."""
        weight = base.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(x, weight.t() if transpose else weight, bias)
        wide = x.to(self.down.dtype)
        if transpose:
            thin = ops.merged_linear(wide, self._none, self.ups, coefficients, transpose=True)
            return y + F.linear(thin, self.down.t()).to(y.dtype)
        thin = F.linear(wide, self.down)
        return y + ops.merged_linear(thin, self._none, self.ups, coefficients).to(y.dtype)

    def coefficient_grad(self, grad_weight: Tensor, base: Tensor | None = None) -> Tensor:
        """As `ops.coefficient_grad`: <grad_weight, up_k down> = <grad_weight down^T, up_k>."""
        accumulate = accumulate_dtype(grad_weight, self.down)
        thin = grad_weight.to(accumulate).flatten(1) @ self.down.to(accumulate).flatten(1).t()
        return ops.coefficient_grad(thin, self.ups)
