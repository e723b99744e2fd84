"""Arcee Fusion: take the expert's most important entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._library import accumulate_dtype, row_width
from ._cuts import Cuts, cut_values
from ._method import Block, Method, Pass, Stats

EPSILON = 1e-8
CHUNK = 1 << 17  # entries whose softmax is formed in fp64 at a time


class ArceeFusion(Method):
    """theta = the expert's entry where its importance is >= the threshold, else the base's.

    importance = |tau| KL(softmax(expert row) || softmax(base row)), rows along the last dimension,
    1e-8 added to the probabilities; threshold = median + 1.5 (q3 - q1) of the tensor's importances,
    quantile q being the entry at floor(q (n - 1)) in order. Quantiles are exact; other tools sample
    a million entries of larger tensors. The divergence is computed in fp64: it is far below fp32's
    resolution of the probabilities.

    Source: Arcee AI, Arcee Fusion; mergekit's `arcee_fusion`.
    """

    name = "arcee_fusion"
    summary = "take the expert's entries whose change matters most, the base's elsewhere"
    formula = "θ₁ where the importance ≥ median + 1.5 IQR, θ₀ elsewhere"
    source = "mergekit"
    experts_range = (1, 1)
    whole_vectors = True

    def __init__(self) -> None:
        pass

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        return Cuts(_importances, _counts, dtype, ties=False).passes()

    def combine(self, block: Block, stats: Stats) -> Tensor:
        importance = _importances(block)[0][0]
        first, median, third = cut_values(stats)[0]
        chosen = importance >= median + 1.5 * (third - first)
        wide = torch.promote_types(block.base.dtype, block.experts[0].dtype)
        return torch.where(chosen, block.experts[0].to(wide), block.base.to(wide)).to(block.dtype)


def _counts(total: int, nonzero: Sequence[int]) -> list[list[int]]:
    return [[total - math.floor(q * max(0, total - 1)) for q in (0.25, 0.5, 0.75)]]


def _importances(block: Block) -> tuple[list[Tensor], None]:
    """|tau| KL of every entry, in the arithmetic's dtype."""
    dtype = accumulate_dtype(block.base, block.experts[0])
    width = row_width(block.base)
    base, expert = (t.reshape(t.numel() // width, width) for t in (block.base, block.experts[0]))
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    step = max(1, CHUNK // width)
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        a, b = base[rows].double(), expert[rows].double()
        p, q = b.softmax(-1) + EPSILON, a.softmax(-1) + EPSILON
        divergence = (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)
        out[rows] = ((b - a).abs() * divergence).to(dtype)
    return [out.reshape(block.base.shape)], None
