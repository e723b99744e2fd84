"""Weighted sum of task vectors under one shared mask, what Concrete subspace learning leaves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..deltas import Concrete, Draw, Experts
from ..ops._library import accumulate_dtype
from ._method import Block
from .weighted import Weighted


class ConcreteWeighted(Weighted):
    """theta = theta_0 + sum_k lambda_k (m / mean(m)) tau_k, one mask m for all task vectors.

    Args:
        rows, heights: the coefficients, as for `Weighted`.
        masks: {tensor name: its mask}.

    Source: Concrete subspace learning (arXiv 2312.06173).
    """

    name = "concrete"
    summary = "base + sum of task vectors under one shared mask, with given coefficients"
    source = "arXiv 2312.06173"
    carries_nonfinite = False  # a mask entry of 0 keeps the base's

    def __init__(
        self,
        rows: Mapping[str, Tensor],
        heights: Mapping[str, int] | None,
        masks: Mapping[str, Draw],
    ):
        super().__init__(rows, heights)
        self.masks = masks

    def add(self, block: Block, coefficients: Tensor) -> Tensor:
        draw, base = self.masks[block.name], block.base
        part = draw.logits.detach().view(-1)[block.offset : block.offset + base.numel()]
        deltas = Concrete(Experts(block.experts), draw, part.view(base.shape), block.offset)
        lam = coefficients.detach().to(base.device, accumulate_dtype(base, block.experts[0]))
        with torch.no_grad():
            return deltas.weighted_sum(base, lam, block.dtype)
