"""TIES-Merging as merge recipes have it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._cuts import cut_masks
from ._gram import task_points
from ._method import Block, Pass, Stats
from ._sampled_cuts import SampledCuts
from ._sparse import (
    SCALING,
    WEIGHT,
    SparseMerge,
    density_parameter,
    normalize_parameter,
    rescale_parameter,
)


class WeightedTies(SparseMerge):
    """TIES with a weight per expert, trimmed tensor by tensor: see `SparseMerge` for the merge.

    trim: per expert and tensor of n entries keep exactly max(1, floor(n density)) of the largest
    |tau|, of equal ones those of lowest index, none for density 0. Weights act before the election,
    0 elects +, and `normalize` divides by the weights of the entries that agree.

    The method `ties` is the paper's: one threshold over the whole model, all entries equal to it
    kept, unweighted votes, cancellations decided by the majority. With equal weights, scope
    "tensor" and without ties and cancellations both agree.

    Source: TIES-Merging (arXiv 2306.01708); the order of operations is that of the merge recipes
    in use (mergekit's `ties`).
    """

    name = "weighted_ties"
    summary = "TIES per tensor with weights before the election, as in merge recipes"
    formula = "θ₀ + λ · disjoint merge of the trimmed wₖτₖ, tensor by tensor"
    source = "arXiv 2306.01708"
    elect = True
    parameters = (
        WEIGHT,
        density_parameter("fraction of each tensor's entries kept"),
        normalize_parameter(True),
        rescale_parameter(False),
        SCALING,
    )

    def __init__(
        self,
        weight: float | Sequence[float] = 1.0,
        density: float | Sequence[float] = 1.0,
        normalize: bool = True,
        rescale: str | bool = False,
        scaling: float = 1.0,
    ):
        super().__init__(weight, density, normalize, rescale, scaling)

    def selection(self, dtype: torch.dtype) -> list[Pass]:
        return SampledCuts(task_points, self._counts, dtype).passes()

    def masks(self, block: Block, stats: Stats) -> Tensor:
        return cut_masks(task_points, block, stats)

    def _counts(self, total: int, nonzero: Sequence[int]) -> list[list[int]]:
        return [
            [0, min(total, max(1, math.floor(density * total))) if density > 0 else 0]
            for density in self.density.of(len(nonzero))
        ]
