"""`combine_and_dot` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import code
from . import calls


def combine_and_dot(
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    grad: Tensor,
    out: Tensor,
    experts: bool = False,
) -> Tensor:
    """Write the weighted sum of one tensor into `out` and return <grad, tau_k> as fp64 [K].

    One read of base, deltas and grad; the bytes are those of weighted_sum and coefficient_grad.

    Args:
        base, grad, out: tensors of one size; out may be base but not grad.
        deltas: K tensors of that size.
        coefficients: fp32 [K].
        experts: whether deltas are fine-tuned weights.
    """
    dots = torch.empty(len(deltas), dtype=torch.float64)
    scratch = calls.doubles(extensions.cpu.scratch_doubles(base.numel(), len(deltas)))
    extensions.cpu.combine_and_dot(
        calls.task_vectors(base, deltas, experts),
        coefficients.data_ptr(),
        grad.data_ptr(),
        out.data_ptr(),
        dots.data_ptr(),
        base.numel(),
        code([grad]),
        code([out]),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return dots
