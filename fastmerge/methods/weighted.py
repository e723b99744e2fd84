"""Weighted sum with given coefficients, what learned AdaMerging coefficients are merged by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..deltas import Experts
from ..ops import weighted_sum
from ..ops._library import accumulate_dtype
from ._method import Block, Method, Stats


class Weighted(Method):
    """theta = theta_0 + sum_k lambda_k tau_k with one row of K coefficients per tensor.

    Args:
        rows: {tensor name: coefficients [K]}.

    Source: AdaMerging (arXiv 2310.02575), task-wise (equal rows) and layer-wise.
    """

    name = "weighted"
    summary = "base + sum of task vectors, each with a given coefficient per tensor"
    source = "arXiv 2310.02575"

    def __init__(self, rows: Mapping[str, Tensor]):
        self.rows = rows

    def combine(self, block: Block, stats: Stats) -> Tensor:
        return add_task_vectors(block, self.rows[block.name])


def add_task_vectors(block: Block, coefficients: Tensor) -> Tensor:
    """base + sum_k lambda_k (expert_k - base) in fp32, k in order, rounded once to the block's dtype.

    Args:
        block: the block.
        coefficients: [K].
    """
    row = coefficients.detach().to(
        block.base.device, accumulate_dtype(block.base, block.experts[0])
    )
    with torch.no_grad():
        return weighted_sum(block.base, Experts(block.experts), row, dtype=block.dtype)
