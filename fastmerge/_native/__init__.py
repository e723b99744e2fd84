"""The compiled kernels as functions of tensors: which there are for a device, or why none.

`cpu` and `cuda` hold the functions, `extensions` the modules they call.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import cpu, cuda, extensions


def available() -> bool:
    """Whether the CPU kernels can run."""
    return extensions.cpu is not None


def unavailable_reason() -> str:
    """Why the CPU kernels cannot run; empty when they can."""
    return extensions.cpu_reason


def cuda_unavailable_reason() -> str:
    """Why the CUDA kernels cannot run; empty when they can."""
    if extensions.cuda is None:
        return extensions.cuda_reason
    return extensions.cuda.device_info()["reason"]


def for_device(device: torch.device) -> tuple[ModuleType | None, str]:
    """The module with the kernels for a device's tensors, or None and why not."""
    if device.type == "cpu":
        return (cpu, "") if available() else (None, unavailable_reason())
    if device.type != "cuda":
        return None, f"there are no compiled kernels for {device.type} tensors"
    if extensions.cuda is None:
        return None, extensions.cuda_reason
    reason = cuda.unavailable_reason(device)
    return (None, reason) if reason else (cuda, "")
