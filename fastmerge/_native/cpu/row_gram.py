"""`row_gram` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from . import calls


def row_gram(base: Tensor | None, deltas: Sequence[Tensor], gram: Tensor, width: int) -> None:
    """Write the inner products of all pairs of task vectors along rows.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        gram: fp64 [rows, K (K + 1) / 2], the upper triangle row by row.
        width: entries of one row.
    """
    extensions.cpu.row_gram(
        calls.task_vectors(base, deltas, base is not None),
        gram.data_ptr(),
        deltas[0].numel(),
        width,
        torch.get_num_threads(),
    )


def exact_sums(values: Tensor, limbs: Tensor) -> None:
    """Add the columns of values fp64 [rows, columns] to limbs int64 [columns, 67]."""
    extensions.cpu.exact_sums(values.data_ptr(), limbs.data_ptr(), *values.shape)
