"""Reinforced agent merging: add what one expert changed, average what several did."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops._library import accumulate_dtype
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import check_number

CHUNK = 1 << 18  # entries computed at a time, those of all experts counted
EPSILON = Parameter("epsilon", 1e-5, "task-vector entries up to this count as unchanged")


class Ram(Method):
    """theta = theta_0 + sum_k x_k / n, x_k = tau_k where |tau_k| > epsilon, n how many there are.

    Args:
        epsilon: entries up to this count as unchanged.

    Source: Reinforced Agent Merging (arXiv 2601.13572).
    """

    name = "ram"
    summary = "add what one expert changed, average what several changed"
    formula = "θ₀ + τₖ where one expert changed an entry, + mean τₖ where several did"
    source = "arXiv 2601.13572"
    parameters = (EPSILON,)

    def __init__(self, epsilon: float = 1e-5):
        self.epsilon = check_number("epsilon", epsilon, 0)

    def combine(self, block: Block, stats: Stats) -> Tensor:
        factors = self._factors(len(block.experts), stats)
        merged = torch.empty(block.base.numel(), dtype=block.dtype, device=block.device)
        for rows, base, taus, changed in self._pieces(block):
            changes = changed.sum(0)
            shared = 1 / changes.clamp(min=1).to(base.dtype)
            total = torch.zeros_like(base)
            for tau, own, factor in zip(taus, changed, factors, strict=True):
                total += torch.where(own, tau * torch.where(changes == 1, factor, shared), 0)
            merged[rows] = base.add_(total).to(block.dtype)
        return merged.view(block.base.shape)

    def _pieces(self, block: Block) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Which entries, a copy of the base's [n], task vectors [K, n], and which they change."""
        dtype = accumulate_dtype(block.base, block.experts[0])
        parts = [tensor.reshape(-1) for tensor in (block.base, *block.experts)]
        step = max(1, CHUNK // len(parts))
        for start in range(0, len(parts[0]), step):
            rows = slice(start, start + step)
            base, *experts = (part[rows].to(dtype, copy=True) for part in parts)
            taus = torch.stack(experts).sub_(base)
            yield rows, base, taus, taus.abs() > self.epsilon

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
    formula = "as ram, what one expert changed alone times 1 + r · min(α, shared / alone)"
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
        counts = torch.zeros(2, len(block.experts), dtype=torch.int64, device=block.device)
        for *_, changed in self._pieces(block):
            changes = changed.sum(0)
            counts[0] += (changed & (changes > 1)).sum(1)
            counts[1] += (changed & (changes == 1)).sum(1)
        return counts.cpu()

    def _factors(self, count: int, stats: Stats) -> list[float]:
        shared, alone = stats["changes"].tolist()
        ratios = [s / max(a, self.epsilon) for s, a in zip(shared, alone, strict=True)]
        return [1 + self.r * min(max(ratio, 0.0), self.alpha) for ratio in ratios]
