"""Runs the value tests in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

FOLDER = Path(__file__).parent / "values"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the value tests run on the GPU themselves")
def test_values_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-W", "ignore"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(FOLDER)],
        cwd=FOLDER.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    # Every file must have run: a folder that collects nothing or skips all is no evidence.
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout
