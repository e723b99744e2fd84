"""Reinforced agent merging: add what one expert changed, average what several did."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._library import accumulate_dtype
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import check_number

EPSILON = Parameter("epsilon", 1e-5, "task-vector entries up to this count as unchanged")


class Ram(Method):
    """theta = theta_0 + sum_k x_k / n, x_k = tau_k where |tau_k| > epsilon, n how many there are.

    Args:
        epsilon: entries up to this count as unchanged.

    Source: Reinforced Agent Merging (arXiv 2601.13572).
    """

    name = "ram"
    summary = "add what one expert changed, average what several changed"
    source = "arXiv 2601.13572"
    parameters = (EPSILON,)

    def __init__(self, epsilon: float = 1e-5):
        self.epsilon = check_number("epsilon", epsilon, 0)

    def combine(self, block: Block, stats: Stats) -> Tensor:
        dtype = accumulate_dtype(block.base, block.experts[0])
        base = block.base.to(dtype)
        changes = self._changes(block)
        total = torch.zeros_like(base)
        for expert, factor in zip(
            block.experts, self._factors(len(block.experts), stats), strict=True
        ):
            tau = expert.to(dtype) - base
            changed = tau.abs() > self.epsilon
            alone = torch.where(changes == 1, factor, 1 / changes.clamp(min=1).to(dtype))
            total += torch.where(changed, tau * alone, 0)
        return (base + total).to(block.dtype)

    def _changes(self, block: Block) -> Tensor:
        """How many experts changed each entry."""
        dtype = accumulate_dtype(block.base, block.experts[0])
        base = block.base.to(dtype)
        return sum(((e.to(dtype) - base).abs() > self.epsilon).int() for e in block.experts)

    def _factors(self, count: int, stats: Stats) -> list[float]:
        """Of each expert's entries that it alone changed."""
        return [1.0] * count


class RamPlus(Ram):
    """As `Ram`, with what expert k alone changed times 1 + r min(alpha, shared_k / alone_k).

    shared_k and alone_k count the entries of the tensor that expert k changed with others and
    alone.

    Args:
        r, alpha: strength and limit of the factor.
        epsilon: entries up to this count as unchanged.

    Source: RAM+ of arXiv 2601.13572, per tensor.
    """

    name = "ramplus_tl"
    summary = "as ram, with what one expert changed alone scaled up"
    parameters = (
        Parameter("r", 0.1, "strength of the factor"),
        Parameter("alpha", 0.2, "largest ratio of shared to lone entries that counts"),
        EPSILON,
    )

    def __init__(self, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5):
        super().__init__(epsilon)
        self.r, self.alpha = check_number("r", r), check_number("alpha", alpha, 0)

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        return [Pass("changes", "tensor", self._count)]

    def _count(self, block: Block, stats: Stats) -> Tensor:
        """Entries that each expert changed with others, and alone: int64 [2, K]."""
        changes = self._changes(block)
        dtype = accumulate_dtype(block.base, block.experts[0])
        base = block.base.to(dtype)
        own = [(e.to(dtype) - base).abs() > self.epsilon for e in block.experts]
        shared = [(o & (changes > 1)).sum() for o in own]
        alone = [(o & (changes == 1)).sum() for o in own]
        return torch.stack([torch.stack(shared), torch.stack(alone)]).cpu()

    def _factors(self, count: int, stats: Stats) -> list[float]:
        shared, alone = stats["changes"].tolist()
        ratios = [s / max(a, self.epsilon) for s, a in zip(shared, alone, strict=True)]
        return [1 + self.r * min(max(ratio, 0.0), self.alpha) for ratio in ratios]
