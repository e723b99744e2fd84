"""DELLA: drop entries at random, small ones more often than large ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import random_key, random_masks
from ._method import Block, Parameter, Stats
from ._parameters import PerExpert
from ._sparse import (
    SCALING,
    WEIGHT,
    SparseMerge,
    density_parameter,
    normalize_parameter,
    rescale_parameter,
)


class Della(SparseMerge):
    """Keep entries with a probability by rank in their row, rescale, elect: see `SparseMerge`.

    p = density - epsilon + 2 epsilon r / (n - 1) for the entry of rank r, from the smallest |tau|,
    among the n of its row (the last dimension; a vector is one row). Needs 0 < density - epsilon
    and density + epsilon < 1; densities 0 and 1 keep nothing and everything.

    The paper rescales every entry by 1 / p; merge recipes restore the L1 norm of each tensor, the
    default here. rescale="density" divides by the mean of p and is neither. The entries kept
    depend on the seed, the tensor's name, the expert's position, the entry's index and its rank.

    Source: DELLA-Merging (arXiv 2406.11617).
    """

    name = "della"
    summary = "drop small entries more often than large ones, rescale, elect signs, merge"
    formula = "θ₀ + λ · elected merge of wₖ mₖ∘τₖ rₖ, mₖ likelier for larger entries of a row"
    source = "arXiv 2406.11617"
    elect = True
    whole_vectors = True
    parameters = (
        WEIGHT,
        density_parameter("mean probability of keeping an entry"),
        Parameter("epsilon", 0.15, "how far probabilities go from density: number, or K numbers"),
        normalize_parameter(True),
        rescale_parameter(True),
        SCALING,
    )

    def __init__(
        self,
        weight: float | Sequence[float] = 1.0,
        density: float | Sequence[float] = 1.0,
        epsilon: float | Sequence[float] = 0.15,
        normalize: bool = True,
        rescale: str | bool = True,
        scaling: float = 1.0,
    ):
        super().__init__(weight, density, normalize, rescale, scaling)
        self.epsilon = PerExpert("epsilon", epsilon, 0, 1)
        count = max(len(p.numbers) if p.several else 1 for p in (self.density, self.epsilon))
        if all(not p.several or len(p.numbers) == count for p in (self.density, self.epsilon)):
            self._ends(count)

    def masks(self, block: Block, stats: Stats) -> Tensor:
        ends = torch.tensor(self._ends(len(block.experts)), dtype=torch.float64)
        return random_masks(
            block.experts,
            ends.to(block.device),
            key=random_key(block.seed, block.name),
            base=block.base,
            offset=block.offset,
        )

    def _ends(self, count: int) -> list[tuple[float, float]]:
        """Probabilities of the smallest and of the largest entry of a row."""
        ends = []
        for density, epsilon in zip(self.density.of(count), self.epsilon.of(count), strict=True):
            if density in (0, 1):
                epsilon = 0
            elif not 0 < density - epsilon or not density + epsilon < 1:
                raise ValueError(
                    f"epsilon must leave density -/+ epsilon between 0 and 1, got density "
                    f"{density:g}, epsilon {epsilon:g}"
                )
            ends.append((density - epsilon, density + epsilon))
        return ends


class DellaLinear(Della):
    """As `Della`, without the election of signs.

    Source: DELLA-Merging (arXiv 2406.11617).
    """

    name = "della_linear"
    summary = "drop small entries more often than large ones, rescale, add the task vectors"
    formula = "θ₀ + λ Σ wₖ mₖ∘τₖ rₖ, mₖ as in della"
    elect = False
    parameters = (*Della.parameters[:3], normalize_parameter(False), *Della.parameters[4:])

    def __init__(
        self,
        weight: float | Sequence[float] = 1.0,
        density: float | Sequence[float] = 1.0,
        epsilon: float | Sequence[float] = 0.15,
        normalize: bool = False,
        rescale: str | bool = True,
        scaling: float = 1.0,
    ):
        super().__init__(weight, density, epsilon, normalize, rescale, scaling)
