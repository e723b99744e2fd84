"""Tensors as the numbers that compiled kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def address(tensor: Tensor | None) -> int:
    """Where a tensor starts, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor starts."""
    return [tensor.data_ptr() for tensor in tensors]


def code(tensors: Sequence[Tensor]) -> int:
    """The code of the tensors' one dtype; any for no tensors."""
    return DTYPE_CODES[tensors[0].dtype] if tensors else 0


def one_dtype(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, in fp32 if their dtypes differ."""
    if len({tensor.dtype for tensor in tensors}) <= 1:
        return tensors
    return [tensor.float() for tensor in tensors]


def flattened(deltas: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """L lists of K tensors as one list of one dtype."""
    return one_dtype([delta for row in deltas for delta in row])
