"""`coefficient_grad` on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

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
    """As the CPU's, with L >= 1 and K <= 256."""
    experts = bases is not None if experts is None else experts
    grads, flat = one_dtype(grads), flattened(deltas)
    bases = one_dtype(bases) if experts else [None] * len(grads)
    dots, scratch = calls.dots(grads, len(deltas[0]))
    extensions.cuda.coefficient_grad(
        calls.place(grads[0]),
        calls.tensors(bases, flat, grads, experts),
        addresses(grads),
        code(grads),
        dots.data_ptr(),
        scratch.data_ptr(),
    )
    return dots
