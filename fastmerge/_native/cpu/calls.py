"""What the calls of the CPU kernels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address, addresses, code, one_dtype


def task_vectors(base: Tensor | None, deltas: Sequence[Tensor], experts: bool):
    """Where a kernel reads K task vectors.

    Args:
        base: subtracted from the deltas with `experts`; None where a kernel does not need it.
        deltas: K tensors of one size.
        experts: whether deltas are fine-tuned weights.
    """
    deltas = one_dtype(deltas)
    bases = [] if base is None else [base]
    return extensions.cpu.TaskVectors(
        address(base), addresses(deltas), code(bases), code(deltas), experts, owners=deltas
    )


def doubles(count: int) -> Tensor:
    """Scratch of a reduction."""
    return torch.empty(count, dtype=torch.float64)
