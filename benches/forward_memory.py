"""Peak memory of a forward pass over a mixed batch, alone in a fresh process.

    python -m benches.forward_memory emr

prints the most bytes that two passes held above what the model keeps.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys

import torch

from .dynamic_models import IMAGES_PER_TASK, ROWS
from .step_memory import PROC, ROOT, status
from .step_models import draw_images
from .vision import build

PLAIN = "plain forward"


def peak_of_forward(way: str, small: bool) -> int | None:
    """Bytes above the model of a way of `ROWS`, or of the base; None where no system tells."""
    if not (PROC / "clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benches.forward_memory", way]
    done = subprocess.run(
        [*command, *(["--small"] if small else [])],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=[PLAIN, *ROWS])
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    device = torch.device("cpu")
    base, experts = build(chosen.small, device)
    images = draw_images(IMAGES_PER_TASK, chosen.small, device)
    run = base if chosen.way == PLAIN else ROWS[chosen.way](base, experts)
    del experts
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or a pass would reuse what building left, uncounted
    (PROC / "clear_refs").write_text("5")
    before = status("VmRSS")
    with torch.inference_mode():
        for _ in range(2):
            run(images)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main()
