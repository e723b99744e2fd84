"""P3 and P4: a whole learning step against the same model's plain step, in time and memory."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmerge as fm

from .side_by_side import Results, interleaved, synchronize

TASKS = 8
PEAK = Path("/proc/self/clear_refs")


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        parts = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self._qkv())
        attended = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = x + self.o(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def _qkv(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v


class _Vision(nn.Module):
    """A vision transformer with ViT-B/32's shapes by default and nothing else to load."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 32, stride=32, bias=False)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 512)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)  # [B, N, width]
        return self.head(self.norm(self.blocks(tokens)).mean(1))


@pytest.fixture(scope="module")
def models(device, small):
    torch.manual_seed(0)
    base = (_Vision(64, 2, 2) if small else _Vision()).to(device).eval()
    experts = []
    for seed in range(TASKS):
        generator = torch.Generator(device).manual_seed(seed)
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for p in expert.parameters():
                p.add_(torch.randn(p.shape, generator=generator, device=device), alpha=2e-3)
        experts.append(expert)
    merged = copy.deepcopy(base)
    coefficients = fm.attach(merged, experts, clamp=None)
    return base, merged, coefficients


def _step(model: nn.Module, images: torch.Tensor, parameters) -> list[torch.Tensor]:
    loss = fm.ops.softmax_entropy(model(images)).view(TASKS, -1).mean(1).sum()
    return torch.autograd.grad(loss, parameters)


def _peak(run, device: torch.device) -> float | None:
    """Bytes allocated at most during one run, above what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        PEAK.write_text("5")
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.parametrize("images_per_task", [1, 8])
def test_step(benchmark, images_per_task, models, device, rounds, small, results: Results):
    base, merged, coefficients = models
    side = 64 if small else 224
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(TASKS * images_per_task, 3, side, side, generator=generator).to(device)
    parameters = list(base.parameters())

    def plain() -> list[torch.Tensor]:
        return _step(base, images, parameters)

    def ours() -> list[torch.Tensor]:
        return _step(merged, images, [coefficients.raw])

    # the gradient with built weights, projected on the task vectors, is the truth
    built = fm.materialize(copy.deepcopy(merged))
    grads = _step(built, images, list(built.parameters()))
    weights = [p for _, p in merged.named_parameters()]
    truth = torch.stack(
        [fm.ops.coefficient_grad(g, w.deltas, w.base) for g, w in zip(grads, weights, strict=True)]
    )
    (gradient,) = ours()
    assert (gradient - truth).abs().max() <= 1e-3 * truth.abs().max()
    del built, grads
    seconds = interleaved({"plain step": plain, "fastmerge": ours}, device, max(3, rounds // 3))
    case = f"step {TASKS}x{images_per_task} images K={TASKS}"
    benchmark.extra_info["ratio"] = results.add("P3", case, seconds, "plain step")["fastmerge"]
    peaks = {"plain": _peak(plain, device), "ours": _peak(ours, device)}
    if all(peaks.values()):
        over = (peaks["ours"] - (32 << 20)) / peaks["plain"]
        benchmark.extra_info["peak"] = peaks
        results.add_value("P4", case, "fastmerge - 32 MiB", over, "plain peak")
    benchmark.pedantic(ours, rounds=1)
