"""DARE: drop entries of the task vectors at random and rescale the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import random_key, random_masks
from ._gram import row_width
from ._method import Block, Stats
from ._sparse import (
    SCALING,
    WEIGHT,
    SparseMerge,
    density_parameter,
    normalize_parameter,
    rescale_parameter,
)


class DareLinear(SparseMerge):
    """Keep each entry of tau_k with probability density_k, rescale, add: see `SparseMerge`.

    The paper rescales by 1 / density, rescale="density" here. The default is what merge recipes
    mean: the L1 norm of each tensor is restored, which differs most where few entries are kept.
    The entries kept depend on the seed, the tensor's name, the expert's position and the entry's
    index only (`fastmerge.ops.random_masks`).

    Source: DARE (arXiv 2311.03099).
    """

    name = "dare_linear"
    summary = "drop entries at random, rescale, add the task vectors"
    formula = "θ₀ + λ Σ wₖ mₖ∘τₖ rₖ, mₖ Bernoulli(density)"
    source = "arXiv 2311.03099"
    elect = False
    parameters = (
        WEIGHT,
        density_parameter("probability of keeping an entry"),
        normalize_parameter(False),
        rescale_parameter(True),
        SCALING,
    )

    def __init__(
        self,
        weight: float | Sequence[float] = 1.0,
        density: float | Sequence[float] = 1.0,
        normalize: bool = False,
        rescale: str | bool = True,
        scaling: float = 1.0,
    ):
        super().__init__(weight, density, normalize, rescale, scaling)

    def masks(self, block: Block, stats: Stats) -> Tensor:
        densities = torch.tensor(self.density.of(len(block.experts)), dtype=torch.float64)
        return random_masks(
            block.experts,
            densities.unsqueeze(1).expand(-1, 2).to(block.device),
            key=random_key(block.seed, block.name),
            width=row_width(block),
            offset=block.offset,
        )


class DareTies(DareLinear):
    """As `DareLinear`, with an election of signs over the weighted task vectors.

    Source: DARE (arXiv 2311.03099) on TIES-Merging (arXiv 2306.01708).
    """

    name = "dare_ties"
    summary = "drop entries at random, rescale, elect signs, add the entries that agree"
    formula = "θ₀ + λ · elected merge of wₖ mₖ∘τₖ rₖ, mₖ Bernoulli(density)"
    elect = True
