"""`coefficient_grad` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import addresses, code, flattened, one_dtype
from . import calls


def coefficient_grad(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor] | None,
    deltas: Sequence[Sequence[Tensor]],
    experts: bool | None = None,
) -> Tensor:
    """Inner products <grads[l], tau_lk> as fp64 [L, K].

    Args:
        grads: L tensors of one dtype.
        bases: L tensors of one dtype, or None.
        deltas: L lists of K tensors.
        experts: whether deltas are fine-tuned weights; by default, whether bases are given.
    """
    count = len(deltas[0]) if deltas else 0
    experts = bases is not None if experts is None else experts
    grads = one_dtype(grads)
    bases = one_dtype(bases or [])
    flat = flattened(deltas)
    sizes = [grad.numel() for grad in grads]
    dots = torch.empty(len(sizes), count, dtype=torch.float64)
    scratch = calls.doubles(sum(extensions.cpu.scratch_doubles(size, count) for size in sizes))
    extensions.cpu.coefficient_grad(
        addresses(grads),
        addresses(bases) if experts else [0] * len(sizes),
        addresses(flat),
        dots.data_ptr(),
        sizes,
        count,
        code(grads),
        code(bases),
        code(flat),
        experts,
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return dots
