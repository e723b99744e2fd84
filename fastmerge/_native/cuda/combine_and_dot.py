"""`combine_and_dot` on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import extensions
from ..arguments import code, one_dtype
from . import calls


def combine_and_dot(
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    grad: Tensor,
    out: Tensor,
    experts: bool = False,
) -> Tensor:
    """As the CPU's, with K <= 256. One read of base, deltas and grad for K <= 8, two for more."""
    deltas = one_dtype(deltas)
    dots, scratch = calls.dots([grad], len(deltas))
    extensions.cuda.combine_and_dot(
        calls.place(out),
        calls.tensors([base], deltas, [out], experts),
        coefficients.data_ptr(),
        [grad.data_ptr()],
        code([grad]),
        [out.data_ptr()],
        code([out]),
        dots.data_ptr(),
        scratch.data_ptr(),
    )
    return dots[0]
