"""Coefficient gradient of a linear layer of masked task vectors: dlambda_k = <dY^T X, tau_k>.

As `coefficient_grad`, but a program meets one tile of the unified vector and then the K tiles of
its masks, one byte for eight entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficient_grad import configurations, gradient_tile, row_share
from .launching import (
    Config,
    by_rows,
    cdiv,
    check,
    check_masks,
    check_shape,
    device_limits,
    is_aligned,
    power_of_two,
    run,
)
from .partial_sums import sum_partials
from .tiles import expanded_bits


@triton.jit
def _masked_coefficient_grad_kernel(
    left_ptr,
    right_ptr,
    unified_ptr,
    masks_ptr,
    partials_ptr,
    rows,
    share,
    outer,
    inner,
    packed,
    stride_lr,
    stride_lo,
    stride_rr,
    stride_ri,
    stride_wo,
    stride_mk,
    stride_mo,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    inner_tiles = tl.cdiv(inner, BLOCK_I)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    in_tile = (tile % inner_tiles).to(tl.int64)
    o = (tile // inner_tiles).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = in_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    first = split.to(tl.int64) * share
    grad = gradient_tile(
        left_ptr,
        right_ptr,
        first,
        tl.minimum(first + share, rows),
        share,
        o,
        i,
        outer,
        inner,
        stride_lr,
        stride_lo,
        stride_rr,
        stride_ri,
        PRECISION,
        BLOCK_O,
        BLOCK_I,
        BLOCK_R,
    )
    mask = (o[:, None] < outer) & (i[None, :] < inner)
    unified_offsets = o[:, None] * stride_wo + i[None, :]
    unified = tl.load(unified_ptr + unified_offsets, mask=mask, other=0.0).to(tl.float32)
    products = grad * unified
    byte = in_tile * (BLOCK_I // 8) + tl.arange(0, BLOCK_I // 8)
    byte_offsets = o[:, None] * stride_mo + byte[None, :]
    byte_mask = (o[:, None] < outer) & (byte[None, :] < packed)
    partial = (split.to(tl.int64) * tl.num_programs(0) + tile) * COUNT
    for k in range(COUNT):
        bits = tl.load(masks_ptr + byte_offsets, mask=byte_mask, other=0)
        chosen = expanded_bits(bits, BLOCK_O, BLOCK_I, True)
        tl.store(partials_ptr + partial + k, tl.sum(tl.where(chosen, products, 0.0)))
        masks_ptr += stride_mk


def linear_masked_coefficient_grad(
    dy: Tensor, x: Tensor, unified: Tensor, masks: Tensor, transpose: bool, tf32: bool = False
) -> Tensor:
    """dlambda_k = <dY^T X, mask_k unified> for all k; dY^T X is never stored.

    Args:
        dy: [R, O], fp32/fp16/bf16, any strides.
        x: [R, I] in dy's dtype.
        unified: [O, I], or [I, O] with `transpose`.
        masks: uint8 [K, unified.shape[0], ceil(unified.shape[1] / 8)], low bits first.
        transpose: whether unified and masks are stored as [I, O].
        tf32: let fp32 products run in tf32.

    Returns:
        [K] fp32.

    Raises:
        RuntimeError: a dtype, device, shape or the device's shared memory does not fit.
    """
    op = "linear_masked_coefficient_grad"
    check(op, {"dy": dy, "x": x}, [unified])
    left, right = (x, dy) if transpose else (dy, x)
    rows, outer, inner = dy.shape[0], left.shape[1], right.shape[1]
    count, packed = masks.shape[0], cdiv(inner, 8)
    check_shape(op, "x", x, [rows, x.shape[1]])
    check_shape(op, "unified", unified, [outer, inner])
    check_masks(op, masks, [count, outer, packed], dy.device)
    if x.dtype != dy.dtype:
        raise RuntimeError(f"{op}: x is {x.dtype}, expected {dy.dtype} as dy")
    if 0 in (rows, outer, inner):
        return torch.zeros(count, dtype=torch.float32, device=dy.device)
    left, right, unified = by_rows(left), by_rows(right), unified.contiguous()
    masks = masks if masks.stride(2) == 1 else masks.contiguous()
    aligned = is_aligned(left, right, unified)
    limit = device_limits(dy.device)[1]
    configs = configurations(outer, inner, dy.dtype, unified.dtype, aligned, limit)
    tiles = cdiv(outer, configs[0].out) * cdiv(inner, configs[0].rows)
    share = row_share(rows, tiles, configs[0].inner)
    grid = tiles, cdiv(rows, share)
    partials = torch.empty(tiles * grid[1], count, dtype=torch.float32, device=dy.device)

    def launch(config: Config) -> None:
        _masked_coefficient_grad_kernel[grid](
            left,
            right,
            unified,
            masks,
            partials,
            rows,
            share,
            outer,
            inner,
            packed,
            *left.stride(),
            *right.stride(),
            unified.stride(0),
            *masks.stride()[:2],
            COUNT=count,
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_O=config.out,
            BLOCK_I=config.rows,
            BLOCK_R=config.inner,
            **config.launch,
        )

    run(
        dy,
        (op, dy.dtype, unified.dtype, count, aligned, tf32, power_of_two(rows), outer, inner),
        configs,
        launch,
    )
    return sum_partials(partials)
