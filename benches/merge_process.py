"""One whole-model TIES merge in a process of its own: CPU seconds, peak memory, the result's norm.

    python benches/merge_process.py fastmerge --experts 4

prints them as JSON. `fusion_bench` runs where FusionBench is installed, without fastmerge.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vision import build

DENSITY, SCALING = 0.2, 0.3


def with_fastmerge(base: nn.Module, experts: list[nn.Module]) -> Callable[[], nn.Module]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastmerge as fm

    return lambda: fm.merge(
        base, experts, method="ties", density=DENSITY, scaling=SCALING, merge="sum"
    )


def with_fusion_bench(base: nn.Module, experts: list[nn.Module]) -> Callable[[], nn.Module]:
    from fusion_bench.method import TiesMergingAlgorithm
    from fusion_bench.modelpool import BaseModelPool

    pool = {"_pretrained_": base} | {f"expert{k}": expert for k, expert in enumerate(experts)}
    method = TiesMergingAlgorithm(
        scaling_factor=SCALING, threshold=round(100 * DENSITY), remove_keys=[], merge_func="sum"
    )
    return lambda: method.run(BaseModelPool(pool))


WAYS = {"fastmerge": with_fastmerge, "fusion_bench": with_fusion_bench}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    base, experts = build(chosen.small, torch.device("cpu"), chosen.experts)
    origin = [p.detach().clone() for p in base.parameters()]  # FusionBench writes into the base
    run = WAYS[chosen.way](base, experts)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, begun, wall = _status("VmRSS"), time.process_time(), time.perf_counter()
    merged = run()
    result = {
        "cpu_seconds": time.process_time() - begun,
        "wall_seconds": time.perf_counter() - wall,
        "peak_bytes": _status("VmHWM") - before,
        "model_bytes": sum(p.numel() * p.element_size() for p in base.parameters()),
    }
    with torch.no_grad():
        pairs = zip(merged.parameters(), origin, strict=True)
        result["norm"] = sum(float((m - b).double().square().sum()) for m, b in pairs) ** 0.5
    print(json.dumps(result))


if __name__ == "__main__":
    main()
