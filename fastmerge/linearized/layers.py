"""The first-order expansion of a LoRA around its start, added to a layer by a hook."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "linearized"  # the adapter is this submodule of the layer it adapts


class LinearizedLora(nn.Module):
    """What a linearised LoRA adds to the output of a linear layer, affine in its parameters.

    y = x W^T + b + s (B0 A0 + dB A0 + B0 dA) x: the tangent at (A0, B0) of x W^T + b + s B A x,
    with dB = B - B0 and dA = A - A0. Where B0 = 0 nothing depends on dA, which then does not exist.

    Args:
        start_down: A0 [r, I].
        scaling: s, LoRA's alpha / r.
        outputs: O.
        start_up: B0 [O, r], None for 0.
        dropout: probability of dropping an entry of x on the way to A, in training mode.

    Attributes:
        up: dB [O, r], a parameter that starts at 0.
        down: dA [r, I], likewise, or None.

    Source: L-LoRA (arXiv 2310.04742).
    """

    def __init__(
        self,
        start_down: Tensor,
        scaling: float,
        outputs: int,
        start_up: Tensor | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("start_down", start_down)
        self.register_buffer("start_up", start_up)
        self.up = nn.Parameter(start_down.new_zeros(outputs, len(start_down)))
        self.down = None if start_up is None else nn.Parameter(torch.zeros_like(start_down))

    def forward(self, x: Tensor) -> Tensor:
        """s (B0 A0 + dB A0 + B0 dA) x, [..., O]."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.up.dtype)
        x = self.dropout(x)
        thin = F.linear(x, self.start_down) * self.scaling  # [..., r]
        if self.down is None:
            return F.linear(thin, self.up)
        moved = F.linear(x, self.down) * self.scaling
        return F.linear(thin, self.start_up + self.up) + F.linear(moved, self.start_up)

    def extra_repr(self) -> str:
        rank, inputs = self.start_down.shape
        return f"rank={rank}, inputs={inputs}, outputs={len(self.up)}, scaling={self.scaling:g}"


def add_change(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook of an adapted layer: its output plus what the adapter adds."""
    return output + getattr(layer, NAME)(arguments[0]).to(output.dtype)


def draw_start(seed: int, name: str, rank: int, inputs: int, like: Tensor) -> Tensor:
    """A0 [rank, inputs] of the layer `name`, uniform in +-1/sqrt(inputs) as PEFT draws it.

    It depends on seed, name and sizes alone: not on the device, on other layers or on their order.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    bound = 1 / math.sqrt(inputs)
    drawn = (torch.rand(rank, inputs, generator=generator) * 2 - 1) * bound
    return drawn.to(like.device, torch.promote_types(like.dtype, torch.float32))
