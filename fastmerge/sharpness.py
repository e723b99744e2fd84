"""Sharpness-aware steps of `learn`: the gradient where the loss is highest nearby."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .learning_step import EagerStep, Values


class SharpnessAwareStep:
    """A step of `learn` whose gradients are taken at lambda + rho g / |g|, g = dL/d lambda.

    |g| is the norm over all coefficients. Losses and logits are those at lambda, where the
    parameters are again when the call ends. Experts are asked once.

    Args:
        inner: the step that computes losses and gradients.
        parameters: the coefficients' parameters.
        radius: rho.

    Source: SAM (arXiv 2010.01412); on merge coefficients SAMerging (arXiv 2512.21288).
    """

    def __init__(self, inner: EagerStep, parameters: list[nn.Parameter], radius: float):
        self.inner, self.parameters, self.radius = inner, parameters, radius

    def __call__(self, inputs: dict[str, Any], step: int) -> tuple[Values, Values]:
        targets = self.inner.targets(inputs)
        found = self.inner(inputs, step, targets)
        losses, logits = ({n: t.clone() for n, t in values.items()} for values in found)
        with torch.no_grad():
            moves = self._moves()
            before = [p.clone() for p in self.parameters]
            for parameter, move in zip(self.parameters, moves, strict=True):
                parameter.add_(move)
        try:
            self.inner(inputs, step, targets)
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)
        return losses, logits

    def _moves(self) -> list[Tensor]:
        """rho g / |g| of every parameter, 0 where the whole gradient is."""
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters
        ]
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
        )
        scale = torch.where(norm > 0, self.radius / norm, 0.0)
        return [g * scale.to(g) for g in gradients]
