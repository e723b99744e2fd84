"""FusionBench's WEMoE beside the same model's plain forward pass, in one process.

    python benches/fusion_wemoe.py routers.safetensors outputs.safetensors --images 8

runs where FusionBench is installed, without fastmerge: its class in the place of the MLPs of the
benches' model, as its CLIP algorithm puts it there, with the routers of a file. Writes what the
model answers and prints as JSON the seconds of both passes. (Everything else is merged here: the
function that its algorithm merges it with, task_arithmetic_merge, raises TypeError in 0.2.33.)

`batch_reduce` is False, so that every sample has coefficients of its own, as the paper has them:
each sample's MLPs are then added up as state dicts and called one by one. (Its algorithm means to
set that before it evaluates, but sets it on the model around the MLPs; the default stays in force.)
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vision import TASKS, build


@torch.no_grad()
def fusion_bench(
    base: nn.Module, experts: list[nn.Module], routers: dict[str, Tensor], scaling: float
) -> nn.Module:
    """The upscaled model.

    Args:
        base, experts: its parts; the experts' MLPs become task vectors.
        routers: {number of the block.name of its router's parameter: value}.
        scaling: lambda of task arithmetic, for everything but the MLPs.
    """
    from fusion_bench.models.we_moe import WeightEnsemblingMoE

    model = copy.deepcopy(base).requires_grad_(False)
    for p, *tuned in zip(*(m.parameters() for m in (model, *experts)), strict=True):
        p += scaling * (sum(tuned) - len(tuned) * p)
    for i, block in enumerate(model.blocks):
        moe = WeightEnsemblingMoE(
            hidden_size=base.norm.weight.shape[0],
            base_model=base.blocks[i].mlp,
            expert_models=[expert.blocks[i].mlp for expert in experts],
            init_lambda=scaling,
            batch_first=True,
            router_hidden_layers=2,
            batch_reduce=False,
        )
        moe.gate.load_state_dict(
            {
                "fc1.weight": routers[f"{i}.hidden.weight"],
                "fc1.bias": routers[f"{i}.hidden.bias"],
                "fc2.weight": routers[f"{i}.weight"],
                "fc2.bias": routers[f"{i}.bias"],
            }
        )
        block.mlp = moe
    return model.eval()


def seconds_of(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    begun = time.perf_counter()
    result = run()
    return time.perf_counter() - begun, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("routers", type=Path)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--images", type=int, default=8, help="images a task")
    parser.add_argument("--scaling", type=float, default=0.3)
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    base, experts = build(chosen.small, torch.device("cpu"))
    side = 64 if chosen.small else 224
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(TASKS * chosen.images, 3, side, side, generator=generator)
    plain = copy.deepcopy(base)
    model = fusion_bench(base, experts, load_file(chosen.routers), chosen.scaling)
    with torch.inference_mode():
        model(images[:1])  # to warm up: its passes over many images take too long
        base_seconds = [seconds_of(lambda: plain(images))[0] for _ in range(4)][1:]
        seconds, outputs = seconds_of(lambda: model(images))
    save_file({"outputs": outputs.contiguous()}, chosen.outputs)
    found = {"plain forward": statistics.median(base_seconds), "fusion_bench": seconds}
    print(json.dumps({"seconds": found}))


if __name__ == "__main__":
    main()
