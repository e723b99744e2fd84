"""FusionBench's layer-wise learning step beside the same model's plain step, in one process.

    python benches/fusion_step.py --images 8 --rounds 3

prints as JSON the median seconds of both, the bytes that two of its steps held above base and
experts, and the norm of the coefficients' gradient. Runs where FusionBench is installed, without
fastmerge. Its own loop is followed: weights merged once a step, a backward pass for every task
through the kept graph, a step of Adam.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vision import TASKS, build

START = 0.3
PROC = Path("/proc/self")


def status(field: str) -> int:
    lines = (PROC / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def fusion_bench(base: nn.Module, experts: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss
    from fusion_bench.models.wrappers.layer_wise_fusion import (
        LayerWiseMergedModel,
        get_layer_wise_weights,
    )

    layers = len(list(base.parameters()))
    merged = LayerWiseMergedModel(
        get_layer_wise_weights(len(experts), layers, START),
        pretrained_model=base,
        finetuned_models=experts,
        clamp_weights=False,
        tie_weights=True,
        strict=False,
    )
    adam = torch.optim.Adam([merged.merge_weight], lr=0.0)  # the same gradient every step
    merged.train()
    merged.merge_weights()

    def step(images: Tensor) -> Tensor:
        for batch in images.chunk(TASKS):
            entropy_loss(merged(batch)).backward(retain_graph=True)
        gradient = merged.merge_weight.grad.detach().clone()
        adam.step()
        adam.zero_grad()
        merged.merge_weights()
        return gradient

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    base, experts = build(chosen.small, torch.device("cpu"))
    side = 64 if chosen.small else 224
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(TASKS * chosen.images, 3, side, side, generator=generator)
    gc.collect()
    (PROC / "clear_refs").write_text("5")
    before = status("VmRSS")
    step = fusion_bench(base, experts)
    for _ in range(2):
        gradient = step(images)
    peak = status("VmHWM") - before

    parameters = [p.requires_grad_() for p in base.parameters()]

    def plain() -> None:
        log_p = base(images).log_softmax(-1)
        loss = -(log_p.exp() * log_p).sum(-1).view(TASKS, -1).mean(1).sum()
        torch.autograd.grad(loss, parameters)

    plain()
    seconds: dict[str, list[float]] = {"plain step": [], "fusion_bench": []}
    for _ in range(chosen.rounds):
        for name, run in (("plain step", plain), ("fusion_bench", lambda: step(images))):
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    print(json.dumps({"seconds": found, "peak_bytes": peak, "norm": gradient.norm().item()}))


if __name__ == "__main__":
    main()
