"""`weighted_sum` on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import extensions
from ..arguments import addresses, code, flattened, one_dtype
from . import calls


def weighted_sum(
    bases: Sequence[Tensor],
    deltas: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    outs: Sequence[Tensor],
    experts: bool = False,
) -> None:
    """As the CPU's, with K <= 256."""
    if not outs:
        return
    bases, flat = one_dtype(bases), flattened(deltas)
    extensions.cuda.weighted_sum(
        calls.place(outs[0]),
        calls.tensors(bases, flat, outs, experts),
        coefficients.data_ptr(),
        addresses(outs),
        code(outs),
    )
