"""One model as it is, or scaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._gram import combine_points
from ._method import Block, Method, Parameter, Stats
from ._parameters import check_number


class Passthrough(Method):
    """theta = scale theta_1, or theta_1 itself.

    Args:
        scale: factor, None or a sequence of one for none.

    Source: mergekit's `passthrough`, for stacks of layers.
    """

    name = "passthrough"
    summary = "the only expert, or a multiple of it"
    formula = "scale · θ₁"
    source = "mergekit"
    needs_base = False
    experts_range = (1, 1)
    parameters = (Parameter("scale", None, "factor of the weights"),)

    def __init__(self, scale: float | Sequence[float | None] | None = None):
        if isinstance(scale, Sequence):
            if len(scale) != 1:
                raise ValueError(f"scale has {len(scale)} values for 1 expert")
            scale = scale[0]
        self.scale = None if scale is None else check_number("scale", scale)

    def combine(self, block: Block, stats: Stats) -> Tensor:
        if self.scale is None:
            return block.experts[0].to(block.dtype, copy=True)
        row = torch.tensor([self.scale], dtype=torch.float64)
        return combine_points(block.experts, row, None, block.dtype)
