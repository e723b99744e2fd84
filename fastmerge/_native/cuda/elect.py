"""`elect` on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import code, one_dtype
from . import calls


def elect(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    unified: Tensor,
    masks: Tensor,
    shape: tuple[int, int],
    leave_out: bool,
) -> Tensor:
    """As the CPU's, with K <= 256; one read of the deltas for K <= 8, two for more."""
    deltas = one_dtype(deltas)
    count = len(deltas)
    doubles = extensions.cuda.mask_scratch_doubles(*shape, 2 * count)
    options = {"dtype": torch.float64, "device": unified.device}
    magnitudes = torch.empty(2, count, **options)
    scratch = torch.empty(doubles, **options)
    extensions.cuda.elect(
        calls.place(unified),
        calls.tensors([base], deltas, [unified], base is not None),
        unified.data_ptr(),
        masks.data_ptr(),
        magnitudes.data_ptr(),
        scratch.data_ptr(),
        *shape,
        code([unified]),
        leave_out,
    )
    return magnitudes
