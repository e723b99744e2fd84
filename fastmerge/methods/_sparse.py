"""What the methods share that merge a part of every task vector's entries, each with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..deltas import Experts
from ..ops import exact_sums, exact_value, masked_merge, masked_sums
from ..ops._library import accumulate_dtype
from ._gram import has_nonfinite, row_width
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import PerExpert, check_number, share

RESCALES = ("none", "l1", "density")
NORM_FLOOR = 1e-7  # below this the L1 rescale leaves a task vector alone

WEIGHT = Parameter("weight", 1.0, "factor of each task vector: a number, or K numbers")
SCALING = Parameter("scaling", 1.0, "factor of the merged task vector (lambda in recipes)")


def normalize_parameter(default: bool) -> Parameter:
    return Parameter("normalize", default, "divide by the weights of the experts that take part")


def density_parameter(doc: str) -> Parameter:
    return Parameter("density", 1.0, f"{doc}: a number, or K numbers, in [0, 1]")


def rescale_parameter(default: str | bool) -> Parameter:
    return Parameter(
        "rescale", default, "l1 or True: restore each L1 norm; density: divide by it; none or False"
    )


class SparseMerge(Method):
    """theta = theta_0 + lambda m, m the weighted merge of the entries that a mask keeps.

    x_k = mask_k tau_k r_k with the rescale factor r_k. m = sum_k w_k x_k, divided by sum_k w_k with
    `normalize` (by 1 if that is below 1e-8 in magnitude). With `elect` each entry has the sign s of
    sum_k w_k x_k, + where that is 0; m is the sum of the w_k x_k of that sign, with `normalize`
    divided by the sum of their w_k (by 1 if that is 0).

    rescale: "l1", r_k = |tau_k|_1 / |mask_k tau_k|_1 over the tensor, 1 if a norm is below 1e-7;
    "density", r_k = 1 / density_k; "none". A density of 1 keeps a task vector as it is.

    Subclasses give `masks` and, if those need to measure, `selection`.
    """

    elect: ClassVar[bool]

    def __init__(
        self,
        weight: float | Sequence[float],
        density: float | Sequence[float],
        normalize: bool,
        rescale: str | bool,
        scaling: float,
    ):
        if isinstance(rescale, bool):
            rescale = "l1" if rescale else "none"
        if rescale not in RESCALES:
            raise ValueError(f"rescale must be one of {', '.join(RESCALES)}, got {rescale!r}")
        self.weight = PerExpert("weight", weight)
        self.density = PerExpert("density", density, 0, 1)
        self.normalize, self.rescale = bool(normalize), rescale
        self.scaling = check_number("scaling", scaling)

    def selection(self, dtype: torch.dtype) -> list[Pass]:
        """Measure passes of the masks."""
        return []

    def masks(self, block: Block, stats: Stats) -> Tensor:
        """Packed masks uint8 [K, ceil(n / 8)]."""
        raise NotImplementedError

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        if self._keeps_all():
            return []
        steps = self.selection(dtype)
        if self.rescale == "l1":
            steps.append(
                Pass(
                    "rescale",
                    "tensor",
                    self._norms,
                    finish=self._factors,
                    nonfinite=has_nonfinite,
                )
            )
        return steps

    def combine(self, block: Block, stats: Stats) -> Tensor:
        count = len(block.experts)
        weights = self.weight.of(count)
        factors = self._rescale_factors(count, stats)
        scaling = self.scaling
        if self.normalize and not self.elect:
            scaling /= share(weights, 1e-8)
        values = [w * r for w, r in zip(weights, factors, strict=True)]
        return masked_merge(
            Experts(block.experts),
            torch.tensor(
                [values, values, weights],
                dtype=accumulate_dtype(block.base, block.experts[0]),
                device=block.device,
            ),
            masks=None if self._keeps_all() else self.masks(block, stats),
            base=block.base,
            elect=self.elect,
            normalize=self.normalize and self.elect,
            scaling=scaling,
            dtype=block.dtype,
        )

    def _keeps_all(self) -> bool:
        """Whether no mask is needed."""
        return self.density.always(1)

    def _rescale_factors(self, count: int, stats: Stats) -> list[float]:
        densities = self.density.of(count)
        if self.rescale == "density":
            return [1 / d if d > 0 else 1.0 for d in densities]
        found = stats.get("rescale", [1.0] * count)
        return [1.0 if d == 1 else r for d, r in zip(densities, found, strict=True)]

    def _norms(self, block: Block, stats: Stats) -> Tensor:
        sums = masked_sums(
            list(block.experts),
            masks=self.masks(block, stats),
            base=block.base,
            width=row_width(block),
        )
        return exact_sums(sums.flatten(1)).cpu()  # [2 K, limbs]

    @staticmethod
    def _factors(limbs: Tensor, stats: Stats) -> list[float]:
        sums = torch.tensor([exact_value(row) for row in limbs], dtype=torch.float64)
        whole, kept = sums.view(2, -1)
        usable = (whole >= NORM_FLOOR) & (kept >= NORM_FLOOR)
        return torch.where(usable, whole / kept, 1.0).tolist()
