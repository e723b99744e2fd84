"""Peak memory of one way to take a learning step, alone in a fresh process.

    python -m benches.step_memory "fastmerge" --images 8

prints the most bytes it held above base and experts, after two steps.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path

import torch

from .step_models import WAYS, draw_images
from .vision import build

PROC = Path("/proc/self")
ROOT = Path(__file__).resolve().parent.parent


def peak_in_fresh_process(way: str, images_per_task: int, small: bool) -> int | None:
    """Bytes above base and experts; None where the system does not tell."""
    if not (PROC / "clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benches.step_memory", way, "--images", str(images_per_task)]
    done = subprocess.run(
        [*command, *(["--small"] if small else [])],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.split()[-1])


def status(field: str) -> int:
    """Bytes that the system tells of this process, such as VmRSS."""
    lines = (PROC / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    device = torch.device("cpu")
    base, experts = build(chosen.small, device)
    images = draw_images(chosen.images, chosen.small, device)
    gc.collect()
    (PROC / "clear_refs").write_text("5")
    before = status("VmRSS")
    step = WAYS[chosen.way](base, experts)
    for _ in range(2):
        step(images)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main()
