"""P8 on any device: one layer with row coefficients against the plain product of its base weight.

A mixed batch of 64 samples of 50 tokens (ViT-B/32) meets 8 experts: one task a sample (EMR-like
selection), a weight of its own for every sample (WEMoE, Twin-Merging), one for every token.

The floor of a weight a sample on a CPU, with K = 8 and 50 rows each: every entry of a weight takes
50 multiply-adds in the product and 8 in the merge, 1.16 of the plain product. Products of 50 rows
with weights of their own reach about 0.9 of the rate of one product over all rows: 1.3.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmerge import ops
from fastmerge.deltas import Experts

from .side_by_side import Results, interleaved

COUNT = 8


@pytest.fixture(params=[(768, 3072), (3072, 768), (768, 768)], ids=str)
def layer(request, device, small):
    inner, outer = (side // 12 if small else side for side in request.param)
    samples, tokens = (16, 5) if small else (64, 50)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).to(device)

    base = normal(outer, inner, scale=0.02)
    experts = [base + normal(outer, inner, scale=0.002) for _ in range(COUNT)]
    x, dy = normal(samples, tokens, inner), normal(samples, tokens, outer)
    tasks = torch.randperm(samples, generator=generator) % COUNT
    coefficients = {
        "a task a sample": F.one_hot(tasks, COUNT).float().unsqueeze(1).to(device),
        "a weight a sample": torch.rand(samples, 1, COUNT, generator=generator).to(device),
        "a weight a token": torch.rand(samples, tokens, COUNT, generator=generator).to(device),
    }
    return base, experts, x, dy, coefficients


def _rebuilt(x, base, experts, coefficients) -> torch.Tensor:
    """The weight of every sample built by plain PyTorch, one sample after the other."""
    outputs = []
    for sample, row in zip(x, coefficients.flatten(0, -2), strict=True):
        weight = base.clone()
        for coefficient, expert in zip(row, experts, strict=True):
            weight += coefficient * (expert - base)
        outputs.append(F.linear(sample, weight))
    return torch.stack(outputs)


def test_forward(benchmark, layer, device, rounds, results: Results):
    base, experts, x, _, coefficients = layer
    deltas = Experts(experts)
    variants = {"gemm": lambda: F.linear(x, base)}
    for name, lam in coefficients.items():
        variants[name] = lambda lam=lam: ops.merged_linear(x, base, deltas, lam)
    own = coefficients["a weight a sample"]
    truth = _rebuilt(x, base, experts, own)
    torch.testing.assert_close(variants["a weight a sample"](), truth, rtol=1e-3, atol=1e-3)
    case = f"rows forward fp32 {list(x.shape)} to {len(base)} K={COUNT}"
    ratios = results.add("P8", case, interleaved(variants, device, rounds), "gemm")
    ours = variants["a weight a sample"]
    slow = {"fastmerge": ours, "rebuilt": lambda: _rebuilt(x, base, experts, own)}
    seconds = interleaved(slow, device, max(1, rounds // 5))
    results.add("P8", f"{case}, a weight a sample", seconds, "fastmerge")
    benchmark.extra_info["ratios"] = ratios
    benchmark.pedantic(ours, rounds=1)


def test_backward(benchmark, layer, device, rounds, results: Results):
    """dX and the coefficients' gradient over the plain layer's dX and dW."""
    base, experts, x, dy, coefficients = layer
    rows, grads = x.flatten(0, 1), dy.flatten(0, 1)
    backward = torch.ops.fastmerge.merged_linear_backward

    def ours(lam: torch.Tensor) -> object:
        return backward(dy, x, base, experts, lam, True, False, True, True)

    variants = {"dx, dw": lambda: (grads @ base, grads.t() @ rows)}
    for name, lam in coefficients.items():
        variants[name] = lambda lam=lam: ours(lam)
    case = f"rows backward fp32 {list(x.shape)} to {len(base)} K={COUNT}"
    seconds = interleaved(variants, device, max(1, rounds // 3))
    benchmark.extra_info["ratios"] = results.add("P8", case, seconds, "dx, dw")
    benchmark.pedantic(variants["a task a sample"], rounds=1)
