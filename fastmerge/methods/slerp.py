"""Spherical interpolation of two models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._gram import combine_points, gram_pass
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import check_number

NEARLY_PARALLEL = 0.9995
SMALLEST_NORM = 1e-8


class Slerp(Method):
    """theta = (sin((1 - t) w) a + sin(t w) b) / sin w, w the angle between a and b, per tensor.

    a and b are two experts, or the base and the only expert. The sines act on a and b themselves,
    not on unit vectors, so lengths are interpolated too. Nearly parallel tensors, |cos w| > 0.9995,
    are interpolated linearly; norms below 1e-8 count as 1.

    Args:
        t: 0 gives a, 1 gives b.

    Source: Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985).
    """

    name = "slerp"
    summary = "spherical interpolation between two models"
    formula = "the point t of the arc from θ₁ to θ₂"
    source = "Shoemake, SIGGRAPH 1985"
    needs_base = False
    experts_range = (1, 2)
    parameters = (Parameter("t", 0.5, "0 gives the first model, 1 the second"),)

    def __init__(self, t: float = 0.5):
        self.t = check_number("t", t)

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        return [gram_pass(lambda block: (_two(block), None))]

    def combine(self, block: Block, stats: Stats) -> Tensor:
        gram = stats["gram"]
        norms = gram.diagonal().sqrt()
        norms = torch.where(norms > SMALLEST_NORM, norms, 1.0)
        cosine = max(-1.0, min(1.0, float(gram[0, 1] / (norms[0] * norms[1]))))
        if abs(cosine) > NEARLY_PARALLEL:
            ends = [1 - self.t, self.t]
        else:
            ends = arc(math.acos(cosine), self.t)
        row = torch.tensor(ends, dtype=torch.float64)
        return combine_points(_two(block), row, None, block.dtype)


def arc(angle: float, t: float) -> list[float]:
    """Coefficients of the two ends of an arc."""
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _two(block: Block) -> list[Tensor]:
    if len(block.experts) == 2:
        return list(block.experts)
    if block.base is None:
        raise ValueError("slerp: one expert and no base; needs two models")
    if block.base.dtype == block.experts[0].dtype:
        return [block.base, block.experts[0]]
    wide = torch.promote_types(block.base.dtype, block.experts[0].dtype)
    return [block.base.to(wide), block.experts[0].to(wide)]
