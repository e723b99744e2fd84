"""FusionBench's mask step of Concrete task arithmetic beside the same model's plain step.

    python benches/fusion_mask_step.py --images 8 --rounds 3 --experts 8

prints as JSON the median seconds of both and the bytes that two of its steps held above base and
experts. Runs where FusionBench is installed, without fastmerge. Its own loop is followed: a mask is
drawn, task vectors are masked and merged, every task runs forward, one backward pass, Adam.
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
from fusion_step import PROC, START, status
from vision import TASKS, build


def fusion_bench(base: nn.Module, experts: list[nn.Module]) -> Callable[[Tensor], None]:
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss
    from fusion_bench.models.masks import MaskModel
    from fusion_bench.models.wrappers.task_wise_fusion import (
        TaskWiseMergedModel,
        get_task_wise_weights,
    )

    masks = MaskModel(base, ignore_untrained_params=True, parameter_type="logits")
    merged = TaskWiseMergedModel(
        get_task_wise_weights(len(experts), START),
        pretrained_model=base,
        finetuned_models=experts,
        clamp_weights=False,
        tie_weights=True,
        strict=False,
    )
    merged.merge_weight.requires_grad_(False)
    adam = torch.optim.Adam(masks.parameters(), lr=1e-3)
    merged.train()

    def step(images: Tensor) -> None:
        drawn = masks.sample_mask(mask_type="continuous", temperature=0.5)
        merged.merge_weights(task_vector_mask={n: m / m.mean() for n, m in drawn.items()})
        loss = sum(entropy_loss(merged(batch)) for batch in images.chunk(TASKS))
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=TASKS)
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    base, experts = build(chosen.small, torch.device("cpu"), chosen.experts)
    side = 64 if chosen.small else 224
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(TASKS * chosen.images, 3, side, side, generator=generator)
    gc.collect()
    (PROC / "clear_refs").write_text("5")
    before = status("VmRSS")
    step = fusion_bench(base, experts)
    for _ in range(2):
        step(images)
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
    print(json.dumps({"seconds": found, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
