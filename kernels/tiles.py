"""Device functions that several kernels share; every one works on fp32 values in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def task_vector_tile(base, delta_ptr, offsets, mask, EXPERTS: tl.constexpr):
    """tau = e - base for an expert, tau = delta for a task vector; `base` is an fp32 tile."""
    tau = tl.load(delta_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if EXPERTS:
        tau -= base
    return tau


@triton.jit
def nth_pointer(pointers, k, COUNT: tl.constexpr):
    """pointers[k] for a k known only at run time, without a table in memory."""
    chosen = pointers[0]
    for j in tl.static_range(1, COUNT):
        chosen = tl.where(k == j, pointers[j], chosen)
    return chosen


@triton.jit
def merged_tile(
    base_ptr,
    delta_ptrs,
    coefficients_ptr,
    offsets,
    mask,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """W = base + sum_k lambda_k tau_k for one tile, added in the order of k.

    GROUP experts are read at once, whose tiles and addresses share the registers; with GROUP =
    COUNT, all of them. The multiply-add is spelled out, so its rounding is no choice of the
    compiler.
    """
    base = tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    merged = base
    looped: tl.constexpr = COUNT // GROUP * GROUP if GROUP < COUNT else 0
    for first in range(0, looped, GROUP):
        for j in tl.static_range(GROUP):
            delta_ptr = nth_pointer(delta_ptrs, first + j, looped)
            tau = task_vector_tile(base, delta_ptr, offsets, mask, EXPERTS)
            merged = tl.fma(tl.load(coefficients_ptr + first + j), tau, merged)
    for k in tl.static_range(looped, COUNT):
        tau = task_vector_tile(base, delta_ptrs[k], offsets, mask, EXPERTS)
        merged = tl.fma(tl.load(coefficients_ptr + k), tau, merged)
    return merged


@triton.jit
def ordered_sum(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of each row of `values` [ROWS, COLUMNS] in an order that no launch parameter changes.

    Neighbours are added in pairs until one column is left: a sum of two has only one order. A
    single `tl.sum` would group the columns by the threads that hold them, and so by the number of
    warps.
    """
    for step in tl.static_range(16):
        if (COLUMNS >> step) > 1:
            values = tl.sum(tl.reshape(values, [ROWS, COLUMNS >> (step + 1), 2]), axis=2)
    return tl.reshape(values, [ROWS])


@triton.jit
def expanded_bits(packed, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PACKED_INNER: tl.constexpr):
    """Which entries of a tile [O, I] are set in bytes [O, I / 8] or [O / 8, I], low bits first."""
    bit = tl.arange(0, 8)
    if PACKED_INNER:
        bits = packed.to(tl.int32)[:, :, None] >> bit[None, None, :]
    else:
        bits = packed.to(tl.int32)[:, None, :] >> bit[None, :, None]
    return tl.reshape(bits & 1, [BLOCK_O, BLOCK_I]) != 0


@triton.jit
def add_product(
    accumulator,
    left_ptr,
    right_ptr,
    o,
    r,
    first,
    steps,
    outer,
    rows,
    inner,
    stride_lo,
    stride_li,
    stride_rr,
    stride_ri,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """accumulator + left [O, I] right [R, I]^T over `steps` blocks of I from `first`."""
    i = tl.arange(0, BLOCK_I).to(tl.int64) + first
    left_offsets = o[:, None] * stride_lo + i[None, :] * stride_li  # [O, I]
    right_offsets = r[None, :] * stride_rr + i[:, None] * stride_ri  # [I, R]
    step = tl.full([], BLOCK_I, tl.int64)
    for _ in range(steps):
        left_mask = (o[:, None] < outer) & (i[None, :] < inner)
        right_mask = (i[:, None] < inner) & (r[None, :] < rows)
        right = tl.load(right_ptr + right_offsets, mask=right_mask, other=0.0)
        left = tl.load(left_ptr + left_offsets, mask=left_mask, other=0.0).to(right.dtype)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
        i += step
        left_offsets += step * stride_li
        right_offsets += step * stride_ri
    return accumulator
