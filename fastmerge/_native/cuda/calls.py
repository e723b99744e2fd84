"""What the calls of the CUDA kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address, addresses, code


@cache
def unavailable_reason(device: torch.device) -> str:
    """Why the kernels cannot run on a CUDA device; empty when they can."""
    info = extensions.cuda.device_info()
    if info["reason"]:
        return info["reason"]
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = extensions.cuda.device_reason(index)
    if reason:
        major, minor = torch.cuda.get_device_capability(index)
        return f"compiled for sm {info['archs']}, the device is sm {major}{minor}: {reason}"
    return ""


@cache
def multiprocessors(index: int) -> int:
    """How many of them a device has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def place(tensor: Tensor):
    """The device and the current stream for work on a tensor."""
    index = tensor.get_device()
    stream = torch.cuda.current_stream(index).cuda_stream
    return extensions.cuda.Place(index, multiprocessors(index), stream)


def tensors(
    bases: Sequence[Tensor | None], flat: Sequence[Tensor], like: Sequence[Tensor], experts: bool
):
    """L bases and their L * K deltas; `like` are L tensors that give the sizes."""
    return extensions.cuda.Tensors(
        [address(base) for base in bases],
        addresses(flat),
        [tensor.numel() for tensor in like],
        len(flat) // len(like),
        code([base for base in bases if base is not None]),
        code(flat),
        experts,
    )


def dots(grads: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Results fp64 [L, K] and the scratch of their reduction."""
    doubles = sum(extensions.cuda.scratch_doubles(grad.numel(), k) for grad in grads)
    options = {"dtype": torch.float64, "device": grads[0].device}
    return torch.empty(len(grads), k, **options), torch.empty(doubles, **options)
