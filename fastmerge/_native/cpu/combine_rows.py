"""`combine_rows` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address, code
from . import calls


def combine_rows(
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    out: Tensor | None,
    grad: Tensor | None = None,
    experts: bool = False,
) -> Tensor | None:
    """Weighted sums of one tensor for G rows of coefficients, and inner products with G gradients.

    Write base + sum_k coefficients[g, k] * tau_k, without the terms whose coefficient is zero, into
    out[g], and return <grad[g], tau_k> as fp64 [G, K]. One read of base and deltas.

    Args:
        base: [rows, width], neighbours along the width side by side.
        deltas: K tensors of that shape, one dtype and base's strides.
        coefficients: fp32 [G, K].
        out: contiguous [G, rows, width]; None for the products alone.
        grad: contiguous [G, rows, width]; None for the sums alone.
        experts: whether deltas are fine-tuned weights.
    """
    (groups, count), (rows, width) = coefficients.shape, base.shape
    threads = torch.get_num_threads()
    dots = None if grad is None else torch.zeros(groups, count, dtype=torch.float64)
    partials = (
        None
        if grad is None
        else calls.doubles(extensions.cpu.scratch_doubles(rows * width, groups * count))
    )
    room = extensions.cpu.combine_rows_scratch(count, groups)
    scratch = torch.empty(threads * room, dtype=torch.float32)
    extensions.cpu.combine_rows(
        calls.task_vectors(base, deltas, experts),
        coefficients.data_ptr(),
        address(out),
        address(grad),
        address(dots),
        groups,
        rows,
        width,
        base.stride(0),
        code([] if out is None else [out]),
        code([] if grad is None else [grad]),
        address(partials),
        scratch.data_ptr(),
        threads,
    )
    return dots
