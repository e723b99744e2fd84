"""The direction of the mean of unit vectors, with the mean length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._gram import combine_points, gram_pass
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import PerExpert, check_number


class MultiSlerp(Method):
    """theta = theta_0 + r m / |m|, m = sum_k w_k u_k, r = sum_k w_k |x_k|, u_k = x_k / |x_k|.

    x are the task vectors, or the models without a base; per tensor. As published, unit vectors
    are projected onto the tangent space at their weighted mean, averaged there and mapped back;
    that average is 0 by construction, so what remains is the direction of the mean. Weights that
    cancel (|m| < eps) interpolate two experts linearly and are an error for more; where all
    x_k are 0, so is the result's.

    Args:
        weight: w, a number or K numbers.
        normalize_weights: divide the weights by their sum.
        eps: added to the norms.

    Source: mergekit's `multislerp` (goddard.blog, multislerp).
    """

    name = "multislerp"
    summary = "direction of the mean unit task vector with the mean length"
    formula = "θ₀ + mean |τₖ| · direction of Σ wₖ τₖ/|τₖ|"
    source = "mergekit"
    needs_base = False
    parameters = (
        Parameter("weight", 1.0, "weight of each expert: a number, or K numbers"),
        Parameter("normalize_weights", True, "divide the weights by their sum"),
        Parameter("eps", 1e-8, "added to the norms"),
    )

    def __init__(
        self,
        weight: float | Sequence[float] = 1.0,
        normalize_weights: bool = True,
        eps: float = 1e-8,
    ):
        self.weight, self.normalize = PerExpert("weight", weight), bool(normalize_weights)
        self.eps = check_number("eps", eps, 0)

    def check(self, names: Sequence[str], experts: Sequence[str]) -> None:
        super().check(names, experts)
        if self.normalize and sum(self.weight.of(len(experts))) == 0:
            raise ValueError("weight must not add up to 0 with normalize_weights=True")

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        return [gram_pass()]

    def combine(self, block: Block, stats: Stats) -> Tensor:
        row = self._coefficients(stats["gram"], block.name)
        return combine_points(block.experts, row, block.base, block.dtype)

    def _coefficients(self, gram: Tensor, name: str) -> Tensor:
        weights = torch.tensor(self.weight.of(len(gram)), dtype=torch.float64)
        if self.normalize:
            weights = weights / weights.sum()
        if len(gram) == 1:
            return torch.ones(1, dtype=torch.float64)
        norms = gram.diagonal().sqrt()
        if not norms.any():
            return weights
        mean = weights / (norms + self.eps) if self.eps else weights / norms.clamp(min=1e-300)
        length = (mean @ gram @ mean).clamp(min=0).sqrt()
        if length < self.eps or length == 0:
            if len(gram) == 2:
                return weights
            raise ValueError(f"tensor {name!r}: multislerp's weighted unit vectors cancel")
        return mean * (weights @ norms) / length
