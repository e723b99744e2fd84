"""Plain PyTorch twins that the tests compare with: built weights and ordinary autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call


def make_experts(model: nn.Module, count: int, scale: float = 0.05) -> list[nn.Module]:
    """Copies of the model with seeded noise on every floating-point parameter."""
    experts = []
    for k in range(count):
        generator = torch.Generator().manual_seed(100 + k)
        expert = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in expert.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype), alpha=scale)
        experts.append(expert)
    return experts


def built_weights(
    base: Mapping[str, Tensor], experts: list[Mapping[str, Tensor]], matrix: Tensor
) -> dict[str, Tensor]:
    """base + sum_k lambda_k (expert_k - base) as ordinary tensors with a graph to the matrix."""
    weights = {}
    for row, name in zip(matrix, base, strict=True):
        total = base[name].detach()
        for coefficient, expert in zip(row, experts, strict=True):
            total = total + coefficient * (expert[name].detach() - base[name].detach())
        weights[name] = total
    return weights


def built_call(
    model: nn.Module, experts: list[nn.Module], matrix: Tensor, call: Callable
) -> Tensor:
    """`call` applied to the model with built weights; gradients reach the matrix [L, K]."""
    base = dict(model.named_parameters())
    weights = built_weights(base, [dict(e.named_parameters()) for e in experts], matrix)
    return call(lambda *args, **kwargs: functional_call(model, weights, args, kwargs))
