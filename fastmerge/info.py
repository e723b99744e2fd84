"""What is installed, which kernels run, and why the others do not: `fastmerge info`."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import __version__, _native
from ._native import extensions
from .ops import _library


def info() -> dict[str, Any]:
    """Versions, native parts with the reasons of missing ones, and the ops' implementations."""
    return {
        "fastmerge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu kernels": _cpu_state(),
        "cuda kernels": _cuda_state(),
        "triton kernels": _triton_state(),
        "ops": {name: _runs_on(name, compiled) for name, compiled in _library.REGISTERED.items()},
    }


def _cpu_state() -> str:
    if not _native.available():
        return f"missing, the reference runs: {_native.unavailable_reason()}"
    return f"{extensions.cpu.isa()} (of {', '.join(extensions.cpu.supported_isas())})"


def _cuda_state() -> str:
    built = extensions.build_info().get("fastmerge._cuda", {}).get("archs", [])
    reason = _native.cuda_unavailable_reason()
    if extensions.cuda is None:
        return f"missing, the reference runs: {reason}"
    compiled = f"compiled for sm {', '.join(built)}"
    return f"{compiled}, not usable here: {reason}" if reason else compiled


def _triton_state() -> str:
    if importlib.util.find_spec("triton") is None:
        return "missing, the reference runs: triton is not installed"
    if not torch.cuda.is_available():
        return "not usable here: torch finds no CUDA device"
    return "usable on compute capability 8.0 and newer"


def _runs_on(name: str, compiled: bool) -> str:
    """What computes the op for CPU tensors and, where there is a GPU, for CUDA tensors."""
    cpu = "native" if compiled and _native.available() else "reference"
    if not torch.cuda.is_available():
        return f"cpu: {cpu}"
    able = {
        "CUDA C++": compiled and name in _CUDA and not _native.cuda_unavailable_reason(),
        "Triton": name in _TRITON and importlib.util.find_spec("triton") is not None,
    }
    return f"cpu: {cpu}, cuda: {' or '.join(k for k, v in able.items() if v) or 'reference'}"


_TRITON = (
    "lowrank_linear",
    "lowrank_linear_backward",
    "masked_linear",
    "masked_linear_backward",
    "merged_linear",
    "merged_linear_backward",
    "residual_adapter",
    "softmax_entropy",
    "softmax_entropy_backward",
)
_CUDA = (
    "weighted_sum",
    "weighted_sum_out",
    "coefficient_grad",
    "combine_and_dot",
    "merged_linear",
    "merged_linear_backward",
    "magnitude_histogram",
    "ties_merge_out",
    "ties_masks",
    "elect",
    "masked_weighted_sum",
    "masked_coefficient_grad",
    "masked_linear",
    "masked_linear_backward",
)


def device_name(device: torch.device) -> str:
    """What the processor or GPU calls itself, for tables of measurements."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The source checkout's commit, with a plus sign if files differ from it; or "unknown"."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        run = partial(subprocess.check_output, text=True, stderr=subprocess.DEVNULL)
        name = run([*git, "rev-parse", "--short", "HEAD"]).strip()
        changed = run([*git, "status", "--porcelain", "-uno"]).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")
