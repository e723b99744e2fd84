"""SCE: select entries by variance, calculate weights by energy, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..deltas import Experts
from ..ops import exact_sums, exact_value, masked_merge, masked_sums, task_variance
from ..ops._library import accumulate_dtype
from ._cuts import cut_masks
from ._gram import row_width
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import check_number
from ._sampled_cuts import SampledCuts


class Sce(Method):
    """theta = theta_0 + sum_k w_k x_k / sum_k w_k over the x_k whose sign is that of sum_k x_k.

    x_k = mask tau_k with one mask for all experts, the floor(v select_topk) entries of largest
    variance over the experts, v those of a variance that is not 0; of equal ones those of lowest
    index. w_k = mean(x_k^2) over the tensor, divided by their sum; sign 0 is +.

    Args:
        select_topk: fraction of the entries selected, 1 for all.
        floor: merge recipes give all experts the same weight where sum_k mean(x_k^2) < 1e-6, which
            holds for most fine-tuned tensors, and divide by at least 1e-6. 0 is the paper's.

    Source: FuseChat (arXiv 2408.07990), section 3.3.
    """

    name = "sce"
    summary = "select by variance, weight by energy, erase entries of the minority sign"
    formula = "θ₀ + Σ wₖ m∘τₖ, m the entries of largest variance, wₖ ∝ mean τₖ²"
    source = "arXiv 2408.07990"
    parameters = (
        Parameter("select_topk", 1.0, "fraction of entries selected by variance, in [0, 1]"),
        Parameter("floor", 1e-6, "energy below which weights are equal; the paper: 0"),
    )

    def __init__(self, select_topk: float = 1.0, floor: float = 1e-6):
        self.select_topk = check_number("select_topk", select_topk, 0, 1)
        self.floor = check_number("floor", floor, 0)

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        steps = []
        if self.select_topk < 1:
            steps = SampledCuts(_variance, self._counts, dtype, nonzero=True).passes()
        return [*steps, Pass("weights", "tensor", self._energies, finish=self._weights)]

    def combine(self, block: Block, stats: Stats) -> Tensor:
        weights = stats["weights"]
        return masked_merge(
            Experts(block.experts),
            torch.tensor(
                [[1.0] * len(weights), weights, weights],
                dtype=accumulate_dtype(block.base, block.experts[0]),
                device=block.device,
            ),
            masks=self._mask(block, stats),
            base=block.base,
            elect=True,
            normalize=True,
            least=self.floor,
            dtype=block.dtype,
        )

    def _counts(self, total: int, nonzero: Sequence[int]) -> list[list[int]]:
        return [[0, math.floor(nonzero[0] * self.select_topk)]]

    def _mask(self, block: Block, stats: Stats) -> Tensor | None:
        return cut_masks(_variance, block, stats) if self.select_topk < 1 else None

    def _energies(self, block: Block, stats: Stats) -> Tensor:
        """Limbs of sum(x_k^2) for each k, then one row with the number of entries."""
        sums = masked_sums(
            list(block.experts),
            masks=self._mask(block, stats),
            base=block.base,
            width=row_width(block),
            square=True,
        )
        limbs = exact_sums(sums[:, 1]).cpu()
        entries = torch.zeros_like(limbs[:1])
        entries[0, 0] = block.experts[0].numel()
        return torch.cat([limbs, entries])

    def _weights(self, limbs: Tensor, stats: Stats) -> list[float]:
        entries = int(limbs[-1, 0])
        energies = [exact_value(row) / max(1, entries) for row in limbs[:-1]]
        total = math.fsum(energies)
        if total < self.floor or total == 0:
            return [1 / len(energies)] * len(energies)
        return [energy / total for energy in energies]


def _variance(block: Block) -> tuple[list[Tensor], None]:
    return [task_variance(block.experts, base=block.base)], None
