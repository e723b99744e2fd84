"""Weighted sums and averages of models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._gram import combine_points
from ._method import Block, Method, Parameter, Stats
from ._parameters import PerExpert
from .average import average_rows


class Linear(Method):
    """theta = sum_k w_k theta_k, divided by sum_k w_k with `normalize`.

    Args:
        weight: w, a number or K numbers.
        normalize: whether to divide by the sum of the weights, which may not be 0.

    Source: Model Soups (arXiv 2203.05482) with weights; `linear` of merge recipes. A base model is
    not read: to have it take part, pass it as an expert.
    """

    name = "linear"
    summary = "weighted average, or weighted sum, of the experts' weights"
    formula = "Σ wₖθₖ, ÷ Σ wₖ with normalize"
    source = "arXiv 2203.05482"
    needs_base = False
    carries_nonfinite = True
    parameters = (
        Parameter("weight", 1.0, "factor of each expert: a number, or K numbers"),
        Parameter("normalize", True, "divide by the sum of the weights"),
    )

    def __init__(self, weight: float | Sequence[float] = 1.0, normalize: bool = True):
        self.weight, self.normalize = PerExpert("weight", weight), bool(normalize)

    def check(self, names: Sequence[str], experts: Sequence[str]) -> None:
        super().check(names, experts)
        if self.normalize and sum(self.weight.of(len(experts))) == 0:
            raise ValueError("weight must not add up to 0 with normalize=True")

    def combine(self, block: Block, stats: Stats) -> Tensor:
        weights = self.weight.of(len(block.experts))
        if self.normalize:
            return average_rows(block, weights)
        row = torch.tensor(weights, dtype=torch.float64)
        return combine_points(block.experts, row, None, block.dtype)
