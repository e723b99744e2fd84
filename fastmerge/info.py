"""What is installed, which kernels run, and why the others do not: `fastmerge info`."""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

import torch

from . import __version__, _native
from .ops import _library


def info() -> dict[str, Any]:
    """Versions, native parts with the reasons of missing ones, and the ops' implementations."""
    triton = importlib.util.find_spec("triton")
    return {
        "fastmerge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu kernels": _cpu_state(),
        "cuda kernels": _cuda_state(),
        "triton kernels": "triton is installed" if triton else "missing: triton is not installed",
        "ops": {name: _implementations(cpu) for name, cpu in _library.REGISTERED.items()},
    }


def _cpu_state() -> str:
    if not _native.available():
        return f"missing, the reference runs: {_native.unavailable_reason()}"
    return f"{_native.cpu.isa()} (of {', '.join(_native.cpu.supported_isas())})"


def _cuda_state() -> str:
    built = _native.build_info().get("fastmerge._cuda", {}).get("archs", [])
    reason = _native.cuda_unavailable_reason()
    if _native.cuda is None:
        return f"missing, the reference runs: {reason}"
    compiled = f"compiled for sm {', '.join(built)}"
    return f"{compiled}, not usable here: {reason}" if reason else compiled


def _implementations(native_cpu: bool) -> str:
    return "native CPU, reference" if native_cpu and _native.available() else "reference"
