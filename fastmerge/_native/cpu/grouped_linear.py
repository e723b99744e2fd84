"""`grouped_linear` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address
from . import calls


def fuses_multiply_add() -> bool:
    """Whether the chosen level has the instruction that `grouped_linear` is fast with."""
    return extensions.cpu.isa() != "baseline"


def grouped_linear(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    sizes: Sequence[int],
    order: Tensor | None = None,
    bias: Tensor | None = None,
    experts: bool = False,
    transpose: bool = False,
) -> Tensor:
    """y_g = x_g W_g^T + bias in fp32 for groups g of rows, W_g = base + sum_k lambda_gk tau_k.

    Terms whose coefficient is zero are left out. No merged weight is built in memory.

    Args:
        x: fp32 [R, I], neighbours in a row side by side.
        base: contiguous [O, I], or [I, O] with `transpose`.
        deltas: K tensors like base.
        coefficients: contiguous fp32 [G, K].
        sizes: rows of each group.
        order: int64 [R], the rows group by group; None for the order they have.
        bias: contiguous fp32 [O], or None.
        experts: whether deltas are fine-tuned weights.
        transpose: False: y = x W^T. True: y = x W.
    """
    (groups, count), (rows, inner) = coefficients.shape, x.shape
    outer = base.shape[1 if transpose else 0]
    strides = (1, outer) if transpose else (inner, 1)
    threads = torch.get_num_threads()
    starts = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
    y = x.new_empty(rows, outer)
    packed, scratch = (
        torch.empty(size, dtype=torch.float32)
        for size in (x.numel(), threads * extensions.cpu.grouped_linear_scratch(count))
    )
    extensions.cpu.grouped_linear(
        calls.task_vectors(base, deltas, experts),
        coefficients.data_ptr(),
        x.data_ptr(),
        address(bias),
        y.data_ptr(),
        starts.data_ptr(),
        address(order),
        packed.data_ptr(),
        scratch.data_ptr(),
        groups,
        outer,
        inner,
        *strides,
        x.stride(0),
        threads,
    )
    return y
