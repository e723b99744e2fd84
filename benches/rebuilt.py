"""WEMoE as its public code evaluates it: every MLP's weights are built anew for every sample."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmerge.modules.router import Router


class RebuiltMlp(nn.Module):
    """An MLP that is merged with a sample's coefficients, run on that sample, and thrown away.

    Args:
        base: the base model's MLP.
        experts: the experts' MLPs; their task vectors are kept.
        router: from the MLP's input [B, T, d] to coefficients [B, K].
    """

    def __init__(self, base: nn.Module, experts: list[nn.Module], router: Router):
        super().__init__()
        self.base, self.router = base, router
        origin = dict(base.named_parameters())
        self.taus = [
            {name: (p - origin[name]).detach() for name, p in expert.named_parameters()}
            for expert in experts
        ]

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for sample, row in zip(x.split(1), self.router(x), strict=True):
            weights = dict(self.base.named_parameters())
            for coefficient, tau in zip(row, self.taus, strict=True):
                for name, delta in tau.items():
                    weights[name] = weights[name] + coefficient * delta
            outputs.append(functional_call(self.base, weights, (sample,)))
        return torch.cat(outputs)


def rebuilt(
    static: nn.Module, base: nn.Module, experts: list[nn.Module], routers: list[Router]
) -> nn.Module:
    """A copy of `static`, the model merged by task arithmetic, whose MLPs are `RebuiltMlp`."""
    model = copy.deepcopy(static)
    for i, router in enumerate(routers):
        mlps = [expert.blocks[i].mlp for expert in experts]
        model.blocks[i].mlp = RebuiltMlp(base.blocks[i].mlp, mlps, router)
    return model
