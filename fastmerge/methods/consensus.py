"""Consensus merging: keep the entries of the merged task vector that several tasks claim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._library import accumulate_dtype, as_task_vector
from ._method import Block, Method, Parameter, Stats
from ._parameters import PerExpert, check_number


def tall_mask(tau: Tensor, merged: Tensor, threshold: float) -> Tensor:
    """TALL mask of one task: |tau_t| > lambda_t |tau - tau_t|, bool like tau.

    Args:
        tau: [*], the task's vector.
        merged: [*], the merged task vector.
        threshold: lambda_t.
    """
    return tau.abs() > threshold * (merged - tau).abs()


class Consensus(Method):
    """theta = theta_0 + lambda m * tau, tau = sum_t tau_t, m = (sum_t M_t >= k).

    M_t = |tau_t| > threshold_t |tau - tau_t| is task t's TALL mask. k = 2 drops what one task alone
    claims and what none does, k = 1 only the latter, k = 0 is task arithmetic. All in fp32, sums in
    the order of the experts, rounded once. The paper tunes lambda, and each threshold within 0.2 to
    0.6, on validation data.

    Args:
        k: how many tasks must claim an entry.
        threshold: of the masks: a number, or K numbers.
        scaling: lambda.

    Source: Consensus merging (arXiv 2405.07813), section 4.3.
    """

    name = "consensus"
    summary = "task arithmetic of the entries that at least k tasks claim"
    formula = "θ₀ + λ m∘Σ τₖ, m: at least k masks |τₜ| > λₜ|τ − τₜ| agree"
    source = "arXiv 2405.07813"
    parameters = (
        Parameter("k", 2, "how many tasks must claim an entry"),
        Parameter("threshold", 0.4, "of the masks: a number, or K numbers"),
        Parameter("scaling", 0.3, "factor of the task vectors"),
    )

    def __init__(self, k: int = 2, threshold: float | Sequence[float] = 0.4, scaling: float = 0.3):
        if not isinstance(k, int) or isinstance(k, bool) or k < 0:
            raise ValueError(f"k must be a number of tasks, 0 or more, got {k!r}")
        self.k = k
        self.threshold = PerExpert("threshold", threshold, 0)
        self.scaling = check_number("scaling", scaling)

    def check(self, names: Sequence[str], experts: Sequence[str]) -> None:
        super().check(names, experts)
        if self.k > len(experts):
            raise ValueError(f"k is {self.k}, but there are only {len(experts)} experts")

    def combine(self, block: Block, stats: Stats) -> Tensor:
        dtype = accumulate_dtype(block.base, *block.experts)
        total = torch.zeros(block.base.shape, dtype=dtype, device=block.device)
        for expert in block.experts:
            total += as_task_vector(block.base, expert, True, dtype)
        claims = torch.zeros(block.base.shape, dtype=torch.int32, device=block.device)
        thresholds = self.threshold.of(len(block.experts))
        for expert, threshold in zip(block.experts, thresholds, strict=True):
            tau = as_task_vector(block.base, expert, True, dtype)
            claims += tall_mask(tau, total, threshold)
        kept = torch.where(claims >= self.k, self.scaling * total, 0)
        return (block.base.to(dtype) + kept).to(block.dtype)
