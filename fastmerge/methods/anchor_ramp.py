"""Anchor ramp: an average in the first blocks that turns into one expert towards the last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import block_positions, precedes_blocks
from ._method import Block, Method, Parameter, Stats
from .average import average_rows


class AnchorRamp(Method):
    """theta = a theta_A + (1 - a) / (K - 1) sum of the others, a = 1/K + (1 - 1/K) x by depth.

    x runs from 0 in the first block to 1 in the last. So first blocks are averaged, and the last
    block is the anchor's, the expert whose head or domain counts. Embeddings are averaged too; what
    follows the blocks (norms, heads) is the anchor's. No data, no training.

    The paper says that weights depend on the layer, from uniform to the anchor's; its schedule
    could not be read, and this linear one is ours.

    Args:
        anchor: position of the anchor among the experts.

    Source: Layer-wise Model Merging for unsupervised domain adaptation (arXiv 2409.15813).
    """

    name = "anchor_ramp"
    summary = "average in the first blocks, more and more of one expert towards the last"
    formula = "a θ_A + (1−a)/(K−1) Σ of the other θₖ, a from 1/K (first block) to 1 (last)"
    source = "arXiv 2409.15813"
    needs_base = False
    experts_range = (2, None)
    parameters = (Parameter("anchor", 0, "position of the expert that later blocks turn into"),)

    def __init__(self, anchor: int = 0):
        if not isinstance(anchor, int) or isinstance(anchor, bool) or anchor < 0:
            raise ValueError(f"anchor must be the position of an expert, from 0, got {anchor!r}")
        self.anchor = anchor
        self.depths: dict[str, float | None] = {}

    def check(self, names: Sequence[str], experts: Sequence[str]) -> None:
        super().check(names, experts)
        if self.anchor >= len(experts):
            raise ValueError(f"anchor {self.anchor} is not in 0..{len(experts) - 1}, the experts")
        self.depths = block_positions(names)

    def combine(self, block: Block, stats: Stats) -> Tensor:
        depth = self.depths.get(block.name)
        weights = ramp_weights(block.name, depth, self.anchor, len(block.experts))
        if weights[self.anchor] == 1:
            return block.experts[self.anchor].to(
                block.dtype, copy=True, memory_format=torch.contiguous_format
            )
        return average_rows(block, weights)


def ramp_weights(name: str, depth: float | None, anchor: int, count: int) -> list[float]:
    """Weights of the K experts in one tensor; they add up to 1.

    Args:
        name: the tensor's name.
        depth: of its block, None outside the blocks.
        anchor: the expert that last blocks turn into.
        count: K.
    """
    if depth is None:
        depth = 0.0 if precedes_blocks(name) else 1.0
    if depth == 1:
        return [float(k == anchor) for k in range(count)]
    own = 1 / count + (1 - 1 / count) * depth
    return [own if k == anchor else (1 - own) / (count - 1) for k in range(count)]
