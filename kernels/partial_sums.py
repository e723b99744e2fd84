"""Second stage of every two-stage reduction: sums over the leading dimension in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import cdiv, on_device, power_of_two
from .tiles import ordered_sum

TILE = 1024  # elements that one program holds


@triton.jit
def _partial_sums_kernel(
    partials_ptr,
    bias_ptr,
    out_ptr,
    parts,
    width,
    bias_width,
    HAS_BIAS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    part = tl.arange(0, BLOCK_PARTS)
    lanes = tl.zeros([BLOCK_WIDTH, BLOCK_PARTS], dtype=tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        index = (start + part).to(tl.int64)
        mask = (column[:, None] < width) & (index[None, :] < parts)
        offsets = index[None, :] * width + column[:, None]
        lanes += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    total = ordered_sum(lanes, BLOCK_WIDTH, BLOCK_PARTS)  # [BLOCK_WIDTH]
    inside = column < width
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column % bias_width, mask=inside, other=0.0)
        total += bias.to(tl.float32)
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def blocks(parts: int, width: int) -> tuple[int, int]:
    """(BLOCK_WIDTH, BLOCK_PARTS): a rule of the shape alone, so it never changes the bytes."""
    block_parts = min(128, power_of_two(parts))
    return min(power_of_two(width), max(1, TILE // block_parts)), block_parts


def sum_partials(
    partials: Tensor, dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> Tensor:
    """sum_t partials[t] (+ bias): lanes over t in steps of a block, then a pairwise tree.

    Args:
        partials: [T, *] fp32, contiguous, T >= 1.
        dtype: of the result; the sum is fp32 and rounded once.
        bias: [last dimension], added before rounding.

    Returns:
        [*] in `dtype`.
    """
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    parts, width = partials.shape[0], out.numel()
    if width == 0:
        return out
    block_width, block_parts = blocks(parts, width)
    with on_device(partials):
        _partial_sums_kernel[(cdiv(width, block_width),)](
            partials,
            bias,
            out,
            parts,
            width,
            partials.shape[-1],
            HAS_BIAS=bias is not None,
            BLOCK_WIDTH=block_width,
            BLOCK_PARTS=block_parts,
            num_warps=4,
        )
    return out
