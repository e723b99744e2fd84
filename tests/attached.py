"""A small model with merged weights, and what plain autograd says about it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmerge as fm

from .plain import built_call, built_weights, make_experts


class Net(nn.Module):
    """Linear layers, a norm, and a head of three classes."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.norm(self.up(x))))


def loss_of(y: Tensor) -> Tensor:
    return y.square().sum()


@dataclass
class Attached:
    """The model, its coefficients, an input, and base and experts to compare with."""

    net: nn.Module
    coefficients: fm.Coefficients
    x: Tensor
    base: nn.Module
    experts: list[nn.Module]

    @property
    def weight(self) -> fm.merged_weight.MergedWeight:
        return self.net.up.weight

    def built(self) -> dict[str, Tensor]:
        """The merged values by plain arithmetic."""
        states = [dict(e.named_parameters()) for e in self.experts]
        matrix = self.coefficients.raw.detach()
        return built_weights(dict(self.base.named_parameters()), states, matrix)

    def gradient(self, x: Tensor | None = None) -> Tensor:
        """The coefficients' gradient of the loss by plain autograd."""
        raw = self.coefficients.raw.detach().clone().requires_grad_()
        x = self.x if x is None else x
        loss = built_call(self.base, self.experts, raw, lambda forward: loss_of(forward(x)))
        return torch.autograd.grad(loss, raw)[0]

    def learns(self, y: Tensor | None = None) -> bool:
        """Whether a backward pass from `y` leaves plain autograd's gradient behind."""
        self.coefficients.raw.grad = None
        loss_of(self.net(self.x) if y is None else y).backward()
        torch.testing.assert_close(self.coefficients.raw.grad, self.gradient())
        return True


def attached() -> Attached:
    torch.manual_seed(0)
    net = Net()
    experts = make_experts(net, 2, scale=0.3)
    base = copy.deepcopy(net)
    x = torch.randn(5, 6)
    return Attached(net, fm.attach(net, experts), x, base, experts)
