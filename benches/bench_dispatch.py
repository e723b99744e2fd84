"""Whether the cost model's pick is within 5 % of the fastest strategy, over a grid of layers."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from fastmerge import ops
from fastmerge.ops._strategy import use_strategy

from .side_by_side import Results, interleaved

merged_linear = importlib.import_module("fastmerge.ops.merged_linear")

ROWS = (1, 16, 64, 256, 1024, 4096, 32768)
WIDTHS = (768, 4096, 14336)
COUNTS = (1, 4, 8, 16)


@pytest.fixture(scope="module")
def within():
    """Every layer's time by the picked strategy over the fastest one's."""
    return []


def _forced(name: str, run):
    def forced() -> object:
        with use_strategy(name):
            return run()

    return forced


@pytest.mark.parametrize("width", WIDTHS)
def test_pick(width, device, small, within, results: Results):
    if device.type == "cpu" and not small:
        pytest.skip("the CPU has one strategy, so nothing is picked")
    side, rows = (width // 48, ROWS[:3]) if small else (width, ROWS)
    dtype = torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    base, *deltas = (weight(side, side) for _ in range(max(COUNTS) + 1))
    for count, many in itertools.product(COUNTS, rows):
        x, lam = weight(many, side), torch.full((count,), 0.3, device=device)
        picked, *_ = merged_linear._choose(x, base, deltas[:count], lam)

        def run(x=x, lam=lam, count=count) -> torch.Tensor:
            return ops.merged_linear(x, base, deltas[:count], lam)

        # on the CPU there is one strategy, and nothing to force
        names = ("panel", "fused") if device.type == "cuda" else ()
        variants = {name: _forced(name, run) for name in names} or {picked or "reference": run}
        seconds = interleaved(variants, device, 3)
        fastest = min(seconds, key=seconds.__getitem__)
        ratio = seconds[picked or "reference"] / seconds[fastest]
        within.append(ratio)
        case = f"{many}x{side} K={count}"
        results.add("D", case, seconds, fastest)
        results.add_value("D", case, f"picked {picked}", ratio, f"{fastest}, the fastest")


def test_most_picks_are_within_five_percent(within, results: Results):
    """The share of the grid, as a row; a table of estimates is corrected from these rows."""
    if not within:
        pytest.skip("no layer was measured")
    share = sum(ratio <= 1.05 for ratio in within) / len(within)
    results.add_value("D", f"{len(within)} layers", "picks within 5 %", share, "all")
