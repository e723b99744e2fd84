"""`masked_combine` on a CUDA device."""

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
    coefficients: Tensor | Sequence[float] = (),
    out: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor | None:
    """As the CPU's, with K <= 256 and coefficients as a tensor, which stays on the device."""
    options = {"dtype": torch.float64, "device": unified.device}
    if unified.numel() == 0:
        return None if grad is None else torch.zeros(len(masks), **options)
    dots = scratch = None
    if grad is not None:
        dots = torch.empty(len(masks), **options)
        doubles = extensions.cuda.mask_scratch_doubles(*shape, len(masks))
        scratch = torch.empty(doubles, **options)
    extensions.cuda.masked_combine(
        calls.place(unified),
        address(base),
        unified.data_ptr(),
        [mask.data_ptr() for mask in masks],
        0 if out is None else coefficients.data_ptr(),
        address(out),
        address(grad),
        address(dots),
        address(scratch),
        *shape,
        code([unified if base is None else base]),
        code([unified]),
        code([unified if out is None else out]),
        code([unified if grad is None else grad]),
    )
    return dots
