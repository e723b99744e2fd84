"""NearSwap: take the expert's value where it is near the base's."""

from __future__ import annotations

from torch import Tensor

from ..ops._library import accumulate_dtype
from ._method import Block, Method, Parameter, Stats
from ._parameters import check_number

SMALLEST = 1e-6


class NearSwap(Method):
    """theta = theta_0 + min(1, t / max(|tau|, 1e-6)) tau: the step from the base is at most t.

    Args:
        t: largest step, >= 0.

    Source: the model card of QuartetAnemoi-70B-t0.0001; mergekit's `nearswap`.
    """

    name = "nearswap"
    summary = "go from the base to the expert by at most t in every entry"
    formula = "θ₀ + τ, every entry at most t"
    source = "mergekit"
    experts_range = (1, 1)
    parameters = (Parameter("t", 1e-4, "largest step of an entry"),)

    def __init__(self, t: float = 1e-4):
        self.t = check_number("t", t, 0)

    def combine(self, block: Block, stats: Stats) -> Tensor:
        dtype = accumulate_dtype(block.base, block.experts[0])
        base = block.base.to(dtype)
        tau = block.experts[0].to(dtype) - base
        step = tau.abs().clamp_(min=SMALLEST).reciprocal_().mul_(self.t).clamp_(max=1)
        return step.mul_(tau).add_(base).to(block.dtype)
