"""`magnitude_histogram` on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address, code
from . import calls


def magnitude_histogram(
    base: Tensor | None,
    delta: Tensor,
    level: int,
    prefix: int,
    counts: Tensor,
    experts: bool = False,
) -> None:
    """As the CPU's."""
    _histogram(base if experts else None, delta, level, prefix, 0, counts)


def magnitude_threshold(
    tensors: Sequence[Tensor], bases: Sequence[Tensor | None], position: int
) -> Tensor:
    """The position-th smallest magnitude of the entries of a list, found without the host.

    Args:
        tensors: tensors of one device, each of any of the dtypes.
        bases: tensors like them to subtract, or None.
        position: rank, from 1, among all entries.

    Returns:
        0-dim fp32 tensor; a NaN counts as larger than infinity; 0 if there are no entries.
    """
    device = tensors[0].device
    # Filled on the device: a copy from the host could not be captured in a graph.
    found = torch.zeros(1, dtype=torch.int64, device=device)
    rank = torch.full((1,), position, dtype=torch.int64, device=device)
    counts = torch.zeros(2, extensions.cuda.histogram_bins, dtype=torch.int64, device=device)
    for level in range(2):
        for tensor, base in zip(tensors, bases, strict=True):
            _histogram(base, tensor, level, 0, found.data_ptr(), counts[level])
        extensions.cuda.magnitude_refine(
            calls.place(found), counts[level].data_ptr(), found.data_ptr(), rank.data_ptr(), level
        )
    return found.to(torch.int32).view(torch.float32)[0]


def _histogram(
    base: Tensor | None, delta: Tensor, level: int, prefix: int, bits: int, counts: Tensor
) -> None:
    """`magnitude_histogram` with the prefix in a number or at the device address `bits`."""
    extensions.cuda.magnitude_histogram(
        calls.place(delta),
        address(base),
        delta.data_ptr(),
        delta.numel(),
        code([] if base is None else [base]),
        code([delta]),
        base is not None,
        level,
        prefix,
        bits,
        counts.data_ptr(),
    )
