"""Weighted sums of masks of one unified vector, and inner products with them, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address, code
from . import calls


def masked_combine(
    unified: Tensor,
    masks: Sequence[Tensor],
    shape: tuple[int, int],
    *,
    base: Tensor | None = None,
    coefficients: Sequence[float] | Tensor = (),
    out: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor | None:
    """Write base + sum_k coefficients_k unified where masks_k into `out`, and return the inner
    products of `grad` with unified where masks_k; what they share is read once.

    Args:
        unified: contiguous, like base, out and grad.
        masks: K tensors uint8 [rows, ceil(columns / 8)], each contiguous.
        shape: (rows, columns) of the tensors.
        base: None stands for zeros.
        coefficients: K numbers, with `out`; fp32 [K] as a tensor. Without `grad` a 0 in a tensor
            leaves its mask out.
        out: may be base; None: no sum.
        grad: None: no inner products.

    Returns:
        fp64 [K], None without `grad`.
    """
    if isinstance(coefficients, Tensor):
        coefficients = coefficients.tolist()
        if grad is None:
            used = [k for k, value in enumerate(coefficients) if value != 0]
            masks, coefficients = [masks[k] for k in used], [coefficients[k] for k in used]
    dots = scratch = None
    if unified.numel() == 0:  # without addresses
        return None if grad is None else torch.zeros(len(masks), dtype=torch.float64)
    if grad is not None:
        dots = calls.doubles(len(masks))
        scratch = calls.doubles(extensions.cpu.mask_scratch_doubles(*shape, len(masks)))
    extensions.cpu.masked_combine(
        address(base),
        unified.data_ptr(),
        [mask.data_ptr() for mask in masks],
        coefficients,
        address(out),
        address(grad),
        address(dots),
        address(scratch),
        *shape,
        code([unified if base is None else base]),
        code([unified]),
        code([unified if out is None else out]),
        code([unified if grad is None else grad]),
        torch.get_num_threads(),
    )
    return dots
