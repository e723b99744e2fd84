"""Spherical interpolation of two models or task vectors by weights, whole or by rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import row_gram
from ..ops._library import accumulate_dtype, row_width
from ._gram import combine_points, gram_pass
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import PerExpert

SMALLEST_NORM = 1e-7
PARALLEL = 1e-16  # sin^2 of an angle that counts as none


class NuSlerp(Method):
    """theta = theta_0 + slerp(x_1, x_2), x the task vectors; of the models without a base.

    t = w_2 / (w_1 + w_2), a half if the sum is below 1e-6; parallel vectors are interpolated
    linearly. The sines act on the vectors themselves, not on unit vectors.

    Args:
        weight: w, a number or two numbers.
        nuslerp_flatten: one angle per tensor; else one per row (the last dimension).
        nuslerp_row_wise: without flatten, one angle per index of the last dimension instead, taken
            over the first. The names are those of merge recipes.

    Source: mergekit's `nuslerp`.
    """

    name = "nuslerp"
    summary = "spherical interpolation of two task vectors, or of two models without a base"
    formula = "θ₀ + the point w₂/(w₁+w₂) of the arc between τ₁ and τ₂"
    source = "mergekit"
    needs_base = False
    experts_range = (2, 2)
    parameters = (
        Parameter("weight", 1.0, "weight of each expert: a number, or two numbers"),
        Parameter("nuslerp_row_wise", False, "angles over the first dimension (without flatten)"),
        Parameter("nuslerp_flatten", True, "one angle per tensor, else one per row"),
    )

    def __init__(
        self,
        weight: float | Sequence[float] = 1.0,
        nuslerp_row_wise: bool = False,
        nuslerp_flatten: bool = True,
    ):
        self.weight = PerExpert("weight", weight)
        self.flatten, self.first_dimension = bool(nuslerp_flatten), bool(nuslerp_row_wise)
        self.whole_tensor = not self.flatten and self.first_dimension
        self.whole_vectors = not self.flatten
        self.weight.check(2)
        first, second = self.weight.of(2)
        total = first + second
        self.t = 0.5 if abs(total) < 1e-6 else second / total

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        return [gram_pass()] if self.flatten else []

    def combine(self, block: Block, stats: Stats) -> Tensor:
        if self.flatten:
            row = self._ends(upper(stats["gram"]).unsqueeze(0))[0]
            return combine_points(block.experts, row, block.base, block.dtype)
        dtype = accumulate_dtype(block.base, block.experts[0])
        tensors = [e.to(dtype) for e in block.experts]
        base = None if block.base is None else block.base.to(dtype)
        if base is not None:
            tensors = [tensor - base for tensor in tensors]
        turned = self.first_dimension and tensors[0].dim() > 1
        if turned:
            tensors = [t.transpose(0, -1).contiguous() for t in tensors]
        ends = self._ends(row_gram(tensors)).to(dtype)  # [rows, 2]
        shape = tensors[0].shape
        flat = [t.reshape(len(ends), row_width(t)) for t in tensors]
        merged = (ends[:, :1] * flat[0] + ends[:, 1:] * flat[1]).reshape(shape)
        if turned:
            merged = merged.transpose(0, -1).contiguous()
        return (merged if base is None else base + merged).to(block.dtype)

    def _ends(self, gram: Tensor) -> Tensor:
        """Coefficients fp64 [rows, 2] from (|x_1|^2, <x_1, x_2>, |x_2|^2) of each row."""
        norms = gram[:, [0, 2]].sqrt().clamp(min=SMALLEST_NORM)
        cosine = (gram[:, 1] / norms.prod(1)).clamp(-1, 1)
        parallel = 1 - cosine.square() <= PARALLEL
        angle = torch.where(parallel, math.pi / 2, cosine.acos())
        arcs = torch.stack([(1 - self.t) * angle, self.t * angle], 1).sin() / angle.sin()[:, None]
        straight = torch.tensor([1 - self.t, self.t], dtype=arcs.dtype, device=arcs.device)
        return torch.where(parallel[:, None], straight, arcs)


def upper(gram: Tensor) -> Tensor:
    """The upper triangle of [P, P], row by row."""
    i, j = torch.triu_indices(*gram.shape)
    return gram[i, j]
