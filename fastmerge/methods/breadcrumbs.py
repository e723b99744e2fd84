"""Model Breadcrumbs: leave out the smallest and the very largest entries of the task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._cuts import cut_masks
from ._gram import task_points
from ._method import Block, Parameter, Pass, Stats
from ._parameters import PerExpert
from ._sampled_cuts import SampledCuts
from ._sparse import (
    SCALING,
    WEIGHT,
    SparseMerge,
    density_parameter,
    normalize_parameter,
    rescale_parameter,
)


class Breadcrumbs(SparseMerge):
    """Per expert and tensor drop the largest and the smallest |tau|, add: see `SparseMerge`.

    Of n entries floor(n gamma) of the largest are dropped and the next floor(n density) kept,
    fewer dropped where the tensor would run out of entries; of equal ones those of lowest index
    count as larger. The paper gives both as percentages beta (bottom) and gamma (top) per layer:
    density = gamma_paper - beta, gamma = 1 - gamma_paper.

    Source: Model Breadcrumbs (arXiv 2312.06795).
    """

    name = "breadcrumbs"
    summary = "drop the smallest and the largest entries, add the task vectors"
    formula = "θ₀ + λ Σ wₖ mₖ∘τₖ, mₖ drops the ⌊nγ⌋ largest and the smallest entries"
    source = "arXiv 2312.06795"
    elect = False
    parameters = (
        WEIGHT,
        density_parameter("fraction of each tensor's entries kept"),
        Parameter("gamma", 0.01, "fraction dropped as outliers: a number, or K numbers"),
        normalize_parameter(False),
        rescale_parameter(False),
        SCALING,
    )

    def __init__(
        self,
        weight: float | Sequence[float] = 1.0,
        density: float | Sequence[float] = 1.0,
        gamma: float | Sequence[float] = 0.01,
        normalize: bool = False,
        rescale: str | bool = False,
        scaling: float = 1.0,
    ):
        super().__init__(weight, density, normalize, rescale, scaling)
        self.gamma = PerExpert("gamma", gamma, 0, 1)

    def selection(self, dtype: torch.dtype) -> list[Pass]:
        return SampledCuts(task_points, self._counts, dtype).passes()

    def masks(self, block: Block, stats: Stats) -> Tensor:
        return cut_masks(task_points, block, stats)

    def _counts(self, total: int, nonzero: Sequence[int]) -> list[list[int]]:
        result = []
        count = len(nonzero)
        for density, gamma in zip(self.density.of(count), self.gamma.of(count), strict=True):
            kept = math.floor(density * total)
            bottom = max(0, total - kept - math.floor(gamma * total))
            result.append([total - bottom - kept, total - bottom] if density < 1 else [0, total])
        return result


class BreadcrumbsTies(Breadcrumbs):
    """As `Breadcrumbs`, with an election of signs over the weighted task vectors.

    Source: Model Breadcrumbs (arXiv 2312.06795) on TIES-Merging (arXiv 2306.01708).
    """

    name = "breadcrumbs_ties"
    summary = "drop the smallest and the largest entries, elect signs, add the entries that agree"
    formula = "θ₀ + λ · elected merge of wₖ mₖ∘τₖ, mₖ as in breadcrumbs"
    elect = True
