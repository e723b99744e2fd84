"""Weight averaging."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..deltas import Experts
from ..ops import weighted_sum
from ..ops._library import accumulate_dtype
from ._method import Block, Method, Parameter, Stats
from ._parameters import check_number


class Average(Method):
    """theta = sum_k w_k theta_k with weights that sum to one.

    Computed as theta_1 + sum_k w_k (theta_k - theta_1), so that equal experts give exactly their
    values; a base gives only the dtype of the result.

    Args:
        weights: K weights, divided by their sum; equal by default.

    Source: Model Soups (arXiv 2203.05482), uniform soup.
    """

    name = "average"
    summary = "mean of the experts' weights"
    formula = "Σ wₖθₖ / Σ wₖ"
    source = "arXiv 2203.05482"
    carries_nonfinite = True
    needs_base = False
    parameters = (Parameter("weights", None, "K weights, divided by their sum; equal by default"),)

    def __init__(self, weights: Sequence[float] | None = None):
        self.weights = (
            None if weights is None else [check_number("weights", float(w)) for w in weights]
        )
        if weights is not None:
            total = math.fsum(self.weights)
            if not math.isfinite(total) or total == 0:
                raise ValueError(f"weights must have a finite sum other than 0, got {weights}")

    def check(self, names: Sequence[str], experts: Sequence[str]) -> None:
        if self.weights is not None and len(self.weights) != len(experts):
            raise ValueError(f"weights has {len(self.weights)} values for {len(experts)} experts")

    def combine(self, block: Block, stats: Stats) -> Tensor:
        return average_rows(block, self.weights or [1.0] * len(block.experts))


def average_rows(block: Block, weights: Sequence[float]) -> Tensor:
    """theta_1 + sum_k w_k / (sum of all w) (theta_k - theta_1), rounded once.

    Args:
        block: the block; its base is not read.
        weights: K weights.
    """
    first, *others = block.experts
    if not others:
        return first.to(block.dtype, copy=True, memory_format=torch.contiguous_format)
    total = math.fsum(weights)
    row = torch.tensor(
        [w / total for w in weights[1:]], dtype=accumulate_dtype(first), device=first.device
    )
    return weighted_sum(first, Experts(others), row, dtype=block.dtype)
