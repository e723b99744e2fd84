"""MetaGPT: coefficients in closed form, from the task vectors' norms over the whole model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import exact_sums, exact_value, masked_sums
from ._gram import row_width
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import PerExpert, check_number
from ._sparse import SparseMerge, density_parameter
from .dare import DareLinear, DareTies
from .weighted import add_task_vectors
from .weighted_ties import WeightedTies

# {vectors: (method that makes and merges them, its rescale)}
VECTORS = {
    "plain": None,
    "ties": (WeightedTies, "none"),
    "dare": (DareLinear, "density"),
    "dare_ties": (DareTies, "density"),
}


class MetaGPT(Method):
    """theta = theta_0 + lambda sum_k lambda_k tau_k, lambda_k = |tau_k|^2 / sum_j |tau_j|^2.

    Norms are of all merged tensors together, in fp64, added exactly: any cut into blocks, threads
    or processes give the same bytes. lambda_k minimises an upper bound of the summed loss
    differences where the models are linear around the base and task vectors are orthogonal. They
    add up to 1: with equal norms the result is the average, with unequal ones the largest task
    vector dominates. All norms 0 give the base.

    `vectors` makes other vectors of the tau_k first, with the norms of those: "ties" trims them
    and elects the signs of sum_k lambda_k tau_k, as `weighted_ties` without normalize; "dare" drops
    entries at random and divides by the density; "dare_ties" does both.

    The paper prints 1 - lambda^2 for the task's own term of the bound; only (1 - lambda)^2 gives
    its equation 15, which this is. There is no published code.

    Args:
        vectors: "plain", "ties", "dare" or "dare_ties".
        density: fraction of entries kept, a number or K numbers; "plain" needs 1.
        scaling: factor of the merged task vector, 1 in the paper.

    Source: MetaGPT (arXiv 2406.11385), equation 15.
    """

    name = "metagpt"
    summary = "task vectors weighted by their squared norms over the whole model"
    formula = "θ₀ + Σ λₖτₖ, λₖ = ‖τₖ‖² / Σⱼ ‖τⱼ‖² over the model"
    source = "arXiv 2406.11385"
    parameters = (
        Parameter("vectors", "plain", "plain, ties, dare or dare_ties: what is weighted"),
        density_parameter("fraction of entries that ties or dare keep"),
        Parameter("scaling", 1.0, "factor of the merged task vector"),
    )

    def __init__(
        self,
        vectors: str = "plain",
        density: float | Sequence[float] = 1.0,
        scaling: float = 1.0,
    ):
        if vectors not in VECTORS:
            raise ValueError(f"vectors must be one of {', '.join(VECTORS)}, got {vectors!r}")
        self.density = PerExpert("density", density, 0, 1)
        self.scaling = check_number("scaling", scaling)
        self.inner: SparseMerge | None = None
        if VECTORS[vectors] is not None:
            kind, rescale = VECTORS[vectors]
            self.inner = kind(density=density, normalize=False, rescale=rescale, scaling=scaling)
        elif not self.density.always(1):
            raise ValueError(f"density belongs to vectors of ties or dare, got {density!r}")

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        steps = [] if self.inner is None else self.inner.passes(dtype)
        return [*steps, Pass("lambdas", "model", self._squares, finish=self._lambdas)]

    def combine(self, block: Block, stats: Stats) -> Tensor:
        lambdas = stats["lambdas"]
        if self.inner is None:
            row = torch.tensor([self.scaling * value for value in lambdas], dtype=torch.float64)
            return add_task_vectors(block, row)
        inner = copy.copy(self.inner)
        inner.weight = PerExpert("weight", lambdas)
        return inner.combine(block, stats)

    def _squares(self, block: Block, stats: Stats) -> Tensor:
        whole = self.inner is None or self.density.always(1)
        sums = masked_sums(
            block.experts,
            masks=None if whole else self.inner.masks(block, stats),
            base=block.base,
            width=row_width(block),
            square=True,
        )
        return exact_sums(sums[:, 1].contiguous()).cpu()  # [K, limbs], of the entries kept

    def _lambdas(self, limbs: Tensor, stats: Stats) -> list[float]:
        squares = [exact_value(row) for row in limbs]
        if self.inner is not None and self.inner.rescale == "density":
            densities = self.density.of(len(squares))
            squares = [s / d**2 if d > 0 else s for s, d in zip(squares, densities, strict=True)]
        for k, square in enumerate(squares):
            if not math.isfinite(square):
                raise ValueError(
                    f"metagpt: task vector {k} has NaN or Inf, or squares beyond fp64: its norm "
                    f"is {square}, expected a finite number"
                )
        total = math.fsum(squares)
        return [s / total for s in squares] if total else [1 / len(squares)] * len(squares)
