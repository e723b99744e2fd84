"""LiNeS: scale the merged task vector by depth, little in the first blocks and more in the last."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import block_positions
from ..deltas import Experts
from ..ops import exact_sums, exact_value, masked_sums, weighted_sum
from ..ops._library import accumulate_dtype
from ._gram import row_width
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import PerExpert, check_number
from .dare import DareLinear
from .task_arithmetic import TaskArithmetic
from .ties import Ties

VECTORS = ("plain", "ties", "dare")


class Lines(Method):
    """theta = theta_0 + (alpha + beta x) m, x a block's depth from 0 (first) to 1 (last).

    m is the sum of the task vectors, or what `vectors` makes of them: "ties" the sums of trimmed
    and elected entries (`ties` with merge="sum"), "dare" of entries drawn at random over the
    density. Tensors outside all blocks get alpha. By default

        alpha = |sum_k tau_k|_1 / (K |m|_1), over the model,

    1 / K for plain sums: the first blocks, which tasks share, are averaged. beta is to be tuned.

    Blocks are found by the numbers in names (`fastmerge.blocks`); each list of blocks, as an
    encoder's and a decoder's, runs from 0 to 1. Editing by a single task vector: K = 1, alpha as
    wished and beta = 1 - alpha.

    Args:
        alpha: factor in the first block and outside the blocks, None for the formula above.
        beta: what the last block's factor has more. The paper tunes it between 0 and 1.
        vectors: "plain", "ties" or "dare".
        density: fraction of entries kept, of "ties" and "dare".

    Source: LiNeS (arXiv 2410.17146), sections 4 and 5, and its code.
    """

    name = "lines"
    summary = "task vectors scaled up linearly from the first block to the last"
    formula = "θ₀ + (α + β·depth) Σ τₖ, depth from 0 in the first block to 1 in the last"
    source = "arXiv 2410.17146"
    parameters = (
        Parameter("alpha", None, "factor in the first block and outside; None: 1/K for plain sums"),
        Parameter("beta", 0.3, "what the last block's factor has more; to be tuned"),
        Parameter("vectors", "plain", "plain, ties or dare: what is scaled"),
        Parameter("density", 1.0, "fraction of entries that ties or dare keep"),
    )

    def __init__(
        self,
        alpha: float | None = None,
        beta: float = 0.3,
        vectors: str = "plain",
        density: float = 1.0,
    ):
        self.alpha = None if alpha is None else check_number("alpha", alpha)
        self.beta = check_number("beta", beta)
        if vectors not in VECTORS:
            raise ValueError(f"vectors must be one of {', '.join(VECTORS)}, got {vectors!r}")
        if vectors == "plain" and density != 1:
            raise ValueError(f"density belongs to vectors of ties or dare, got {density!r}")
        self.plain = vectors == "plain"
        if vectors == "plain":
            self.inner: Method = TaskArithmetic(scaling=1.0)
        elif vectors == "ties":
            self.inner = Ties(density, merge="sum")
        else:
            self.inner = DareLinear(density=density, rescale="density")
        self.depths: dict[str, float | None] = {}

    def check(self, names: Sequence[str], experts: Sequence[str]) -> None:
        super().check(names, experts)
        self.depths = block_positions(names)

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        steps = self.inner.passes(dtype)
        if self.alpha is None and not self.plain:
            steps.append(Pass("alpha", "model", self._norms, finish=_alpha))
        return steps

    def combine(self, block: Block, stats: Stats) -> Tensor:
        alpha = self.alpha
        if alpha is None:
            alpha = stats.get("alpha", 1.0) / len(block.experts)
        return self._scaled(scale_at(self.depths.get(block.name), alpha, self.beta), block, stats)

    def _scaled(self, scaling: float, block: Block, stats: Stats) -> Tensor:
        inner = copy.copy(self.inner)
        inner.scaling = PerExpert("scaling", scaling) if self.plain else scaling
        return inner.combine(block, stats)

    def _norms(self, block: Block, stats: Stats) -> Tensor:
        """Of the sum of the task vectors, and of what is scaled: int64 [2, limbs]."""
        dtype = accumulate_dtype(block.base, block.experts[0])
        base = block.base.to(dtype)
        ones = torch.ones(len(block.experts), dtype=dtype, device=block.device)
        total = weighted_sum(block.base, Experts(block.experts), ones, dtype=dtype)
        exact = Block(block.name, base, block.experts, block.offset, dtype, block.seed)
        merged = self._scaled(1.0, exact, stats)
        sums = masked_sums([total, merged], base=base, width=row_width(block))
        return exact_sums(sums[:, 0].contiguous()).cpu()


def scale_at(depth: float | None, alpha: float, beta: float) -> float:
    """alpha + beta depth; alpha outside the blocks, where depth is None."""
    return alpha + beta * (depth or 0.0)


def _alpha(limbs: Tensor, stats: Stats) -> float:
    total, merged = (exact_value(row) for row in limbs)
    return total / merged if merged else 1.0
