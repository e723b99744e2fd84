"""Memory for the results of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extensions

HUGE_PAGES_FROM = 4 << 20  # bytes


def fresh(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of a tensor's shape, for a result.

    Faulting in small pages costs several times what a streaming kernel takes to fill them, so a
    large CPU tensor asks for huge ones.
    """
    out = like.new_empty(like.shape, dtype=dtype)
    real = type(out) is Tensor and out.device.type == "cpu"
    if extensions.cpu is not None and real and out.nbytes >= HUGE_PAGES_FROM:
        extensions.cpu.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
