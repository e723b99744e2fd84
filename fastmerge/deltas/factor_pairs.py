"""Deltas of two factors that are merged each by itself, as Twin-Merging's code treats adapters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ._format import Deltas


class FactorPairs(Deltas):
    """W = base + B(lambda) A(lambda), A(lambda) = A + sum_k lambda_k a_k, B(lambda) likewise.

    Not linear in lambda: there are no task vectors tau_k, and layers compute the two thin products
    one after the other.

    Args:
        down: A [r, *], with the weight's trailing dimensions.
        up: B [O, r].
        downs: the K deltas a_k of A.
        ups: the K deltas b_k of B.

    Source: Twin-Merging's code for LoRA (arXiv 2406.15479); its paper's appendix treats adapters as
    products, which `LowRank` stores.
    """

    def __init__(self, down: Tensor, up: Tensor, downs: Deltas, ups: Deltas):
        self.down, self.up, self.downs, self.ups = down, up, downs, ups

    def __len__(self) -> int:
        return len(self.downs)

    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes + self.downs.nbytes() + self.ups.nbytes()

    def rows(self, start: int, stop: int) -> FactorPairs:
        return FactorPairs(self.down, self.up[start:stop], self.downs, self.ups.rows(start, stop))

    def entry(self, index: int) -> Deltas:
        raise NotImplementedError("an entry of a weight has no factors to merge by themselves")

    def gather(self, ids: Tensor) -> FactorPairs:
        up = self.up.index_select(0, ids)
        return FactorPairs(self.down, up, self.downs, self.ups.gather(ids))

    def flat(self) -> FactorPairs:
        return FactorPairs(self.down.flatten(1), self.up, self.downs.flat(), self.ups)

    def task_vectors(self, base: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        raise NotImplementedError(
            "factors that are merged by themselves have no task vectors: use lora='product' for "
            "layers that are not linear"
        )

    def weighted_sum(
        self, base: Tensor, coefficients: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """base + B(lambda) A(lambda), coefficients [K]."""
        down = ops.weighted_sum(self.down, self.downs, coefficients).flatten(1)
        up = ops.weighted_sum(self.up, self.ups, coefficients)
        total = base.flatten(1).to(up.dtype).addmm(up, down)
        return total.view(base.shape).to(dtype or base.dtype)

    def merged_linear(
        self,
        x: Tensor,
        base: Tensor,
        coefficients: Tensor,
        bias: Tensor | None = None,
        transpose: bool = False,
    ) -> Tensor:
        """x (base + B(lambda) A(lambda))^T + bias; coefficients [K] or row coefficients."""
        first, last = (self.down, self.downs), (self.up, self.ups)
        first, last = (last, first) if transpose else (first, last)
        thin = ops.merged_linear(x, *first, coefficients, transpose=transpose)
        y = ops.merged_linear(thin, *last, coefficients, transpose=transpose)
        weight = base.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return y + F.linear(x, weight.t() if transpose else weight, bias)

    def coefficient_grad(self, grad_weight: Tensor, base: Tensor | None = None) -> Tensor:
        raise NotImplementedError("the weight is not linear in coefficients of single factors")
