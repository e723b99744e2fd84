"""The model that steps and merges are measured on: needs nothing but torch."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TASKS = 8


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(up=up, gelu=nn.GELU(), down=down))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        parts = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self._qkv())
        attended = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = x + self.o(attended)
        return x + self.mlp(self.norm2(x))

    def _qkv(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v


class Vision(nn.Module):
    """A vision transformer of the given shapes and nothing else to load."""

    def __init__(self, width: int, depth: int, heads: int, patch: int):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 512)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)  # [B, N, width]
        return self.head(self.norm(self.blocks(tokens)).mean(1))


# Width, depth, heads and side of a patch.
SHAPES = {"ViT-B/32": (768, 12, 12, 32), "ViT-L/14": (1024, 24, 16, 14)}
SMALL = {"ViT-B/32": (64, 2, 2, 32), "ViT-L/14": (64, 3, 2, 14)}


def build(
    small: bool, device: torch.device, count: int = TASKS, shape: str = "ViT-B/32"
) -> tuple[nn.Module, list[nn.Module]]:
    """A base model of the named shapes and `count` experts, the same for every call."""
    torch.manual_seed(0)
    base = Vision(*(SMALL if small else SHAPES)[shape]).to(device).eval()
    experts = []
    for seed in range(count):
        generator = torch.Generator(device).manual_seed(seed)
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for p in expert.parameters():
                p.add_(torch.randn(p.shape, generator=generator, device=device), alpha=2e-3)
        experts.append(expert)
    return base, experts
