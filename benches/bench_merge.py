"""Whole-model TIES in memory, beside FusionBench where there is an interpreter that has it.

FASTMERGE_FUSIONBENCH names that interpreter; without it only our own figures are recorded.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from .side_by_side import Results

SCRIPT = Path(__file__).with_name("merge_process.py")


def _run(interpreter: str, way: str, experts: int, small: bool) -> dict[str, float]:
    command = [interpreter, str(SCRIPT), way, "--experts", str(experts)]
    done = subprocess.run(
        [*command, *(["--small"] if small else [])], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("experts", [4, 8])
def test_whole_model_ties(experts, device, rounds, small, results: Results):
    """CPU seconds and peak memory above the inputs, processes in turn."""
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        pytest.skip("measures a process's memory on the CPU")
    ways = {"fastmerge": sys.executable}
    other = os.environ.get("FASTMERGE_FUSIONBENCH")
    if other and experts == 4:  # 8 need more memory than many machines have
        ways["fusion_bench"] = other
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(1 if small else min(3, rounds)):
        for way, interpreter in ways.items():
            runs[way].append(_run(interpreter, way, experts, small))
    norms = [run["norm"] for found in runs.values() for run in found]
    assert max(norms) <= min(norms) * (1 + 1e-4), "the results differ"
    case = f"whole-model TIES fp32 K={experts}"
    seconds = {w: statistics.median(r["cpu_seconds"] for r in found) for w, found in runs.items()}
    results.add("TIES", case + " CPU", seconds, "fastmerge")
    for way, found in runs.items():
        peak = max(run["peak_bytes"] for run in found)
        results.add_value("TIES", case, way, peak / found[0]["model_bytes"], "one model", int(peak))
