"""Weighted sum with given coefficients, what learned AdaMerging coefficients are merged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..deltas import Experts
from ..ops import weighted_sum
from ..ops._library import accumulate_dtype
from ._method import Block, Method, Stats


class Weighted(Method):
    """theta = theta_0 + sum_k lambda_k tau_k with one row of K coefficients per tensor.

    Args:
        rows: {tensor name: coefficients [K], or [C, K] for C nearly equal chunks of its rows}.
        heights: {tensor name: its number of rows}, needed where there are chunks.

    Source: AdaMerging (arXiv 2310.02575), task-wise (equal rows) and layer-wise.
    """

    name = "weighted"
    summary = "base + sum of task vectors, each with a given coefficient per tensor"
    source = "arXiv 2310.02575"
    carries_nonfinite = True

    def __init__(self, rows: Mapping[str, Tensor], heights: Mapping[str, int] | None = None):
        self.rows, self.heights = rows, heights or {}

    def combine(self, block: Block, stats: Stats) -> Tensor:
        row = self.rows[block.name]
        if row.dim() == 1:
            return self.add(block, row)
        count, height = len(row), self.heights[block.name]
        first = block.offset // max(1, block.base[:1].numel())  # index of the block's first row
        last, merged = first + len(block.base), []
        for chunk in range(count):
            start = max(first, height * chunk // count) - first
            stop = min(last, height * (chunk + 1) // count) - first
            if start < stop:
                part = replace(
                    block,
                    base=block.base[start:stop],
                    experts=[expert[start:stop] for expert in block.experts],
                    offset=block.offset + start * block.base[:1].numel(),
                )
                merged.append(self.add(part, row[chunk]))
        return torch.cat(merged)

    def add(self, block: Block, coefficients: Tensor) -> Tensor:
        """The merged block of a chunk of rows, coefficients [K]."""
        return add_task_vectors(block, coefficients)


def add_task_vectors(block: Block, coefficients: Tensor) -> Tensor:
    """base + sum_k lambda_k (expert_k - base) in fp32, k in order, rounded once to block.dtype.

    Args:
        block: the block.
        coefficients: [K].
    """
    row = coefficients.detach().to(
        block.base.device, accumulate_dtype(block.base, block.experts[0])
    )
    with torch.no_grad():
        return weighted_sum(block.base, Experts(block.experts), row, dtype=block.dtype)
