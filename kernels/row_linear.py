"""Linear layer with row coefficients: y_r = (base + sum_k lambda_rk tau_k) x_r + b.

Each row has its own merged weight, so nothing is merged: base and the K task vectors take their
turn in the matrix product, each product [O, R] is scaled per row and added in fp32 in the order of
k. The backward pass is the same walk with the weights' strides exchanged, and dlambda_rk is the
dot of x_r with the k-th product; per-tile dots are added in a fixed order by a second kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import (
    Config,
    by_rows,
    cdiv,
    check_shape,
    device_limits,
    fitting,
    is_aligned,
    linear_arguments,
    power_of_two,
    run,
)
from .partial_sums import sum_partials
from .tiles import nth_pointer, task_vector_tile


@triton.jit
def _product_tile(
    x_ptr,
    base_ptr,
    delta_ptr,
    o,
    r,
    rows,
    inner,
    outer,
    stride_xr,
    stride_xi,
    stride_wo,
    stride_wi,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    i = tl.arange(0, BLOCK_I).to(tl.int64)
    x_offsets = r[None, :] * stride_xr + i[:, None] * stride_xi  # [I, R]
    w_offsets = o[:, None] * stride_wo + i[None, :] * stride_wi  # [O, I]
    step = tl.full([], BLOCK_I, tl.int64)
    accumulator = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    for _ in range(tl.cdiv(inner, BLOCK_I)):
        w_mask = (o[:, None] < outer) & (i[None, :] < inner)
        x_mask = (i[:, None] < inner) & (r[None, :] < rows)
        base = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
        if EXPERTS:
            base = tl.load(base_ptr + w_offsets, mask=w_mask, other=0.0).to(tl.float32)
        tau = task_vector_tile(base, delta_ptr, w_offsets, w_mask, EXPERTS)
        x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0.0)
        accumulator = tl.dot(tau.to(x.dtype), x, accumulator, input_precision=PRECISION)
        i += step
        x_offsets += step * stride_xi
        w_offsets += step * stride_wi
    return accumulator


@triton.jit
def _row_linear_kernel(
    x_ptr,
    base_ptr,
    delta_ptrs,
    coefficients_ptr,
    bias_ptr,
    other_ptr,
    y_ptr,
    dots_ptr,
    rows,
    inner,
    outer,
    stride_xr,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_or,
    stride_oo,
    COUNT: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0)
    out_tile = (tile // row_tiles).to(tl.int64)
    o = out_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    r = (tile % row_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (o[:, None] < outer) & (r[None, :] < rows)
    total = _product_tile(
        x_ptr,
        base_ptr,
        base_ptr,
        o,
        r,
        rows,
        inner,
        outer,
        stride_xr,
        stride_xi,
        stride_wo,
        stride_wi,
        False,
        PRECISION,
        BLOCK_O,
        BLOCK_R,
        BLOCK_I,
    )
    for k in range(COUNT):
        product = _product_tile(
            x_ptr,
            base_ptr,
            nth_pointer(delta_ptrs, k, COUNT),
            o,
            r,
            rows,
            inner,
            outer,
            stride_xr,
            stride_xi,
            stride_wo,
            stride_wi,
            EXPERTS,
            PRECISION,
            BLOCK_O,
            BLOCK_R,
            BLOCK_I,
        )
        scale = tl.load(coefficients_ptr + r * COUNT + k, mask=r < rows, other=0.0)
        total = tl.fma(scale[None, :], product, total)
        if HAS_DOTS:
            other_offsets = r[None, :] * stride_or + o[:, None] * stride_oo
            other = tl.load(other_ptr + other_offsets, mask=mask, other=0.0).to(tl.float32)
            dots = tl.sum(product * other, axis=0)  # [R]
            tl.store(dots_ptr + (out_tile * rows + r) * COUNT + k, dots, mask=r < rows)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o < outer, other=0.0).to(tl.float32)
        total += bias[:, None]
    y_offsets = r[None, :] * outer + o[:, None]
    tl.store(y_ptr + y_offsets, total.to(y_ptr.dtype.element_ty), mask=mask)


STAGES = (3, 2)


def tile(rows: int, x_bytes: int, weight_bytes: int, aligned: bool) -> tuple[int, int, int, int]:
    """(out, rows, inner, warps): a rule of row count and dtypes, as it orders the row dots.

    What is not `aligned` is read element by element, which takes an address for each.
    """
    width = min(64, max(16, power_of_two(rows)))
    if x_bytes == 4 or not aligned:
        return 64, min(32, width), 16, 8
    if rows > 512 and weight_bytes == 2:
        return 128, 64, 32, 8
    return 64, width, 64, 8 if width == 64 or weight_bytes == 4 else 4


def needed_shared_memory(config: Config, x_bytes: int, weight_bytes: int) -> int:
    """Upper bound of a block's shared memory; `weight_bytes`: delta, and base under experts."""
    weights = config.out * ((config.stages - 1) * weight_bytes + x_bytes)
    inputs = config.inner * (weights + config.rows * config.stages * x_bytes)
    return max(inputs, config.out * config.rows * 4)


def configurations(
    rows: int,
    x_dtype: torch.dtype,
    base_dtype: torch.dtype,
    delta_dtype: torch.dtype,
    aligned: bool,
    limit: int,
) -> list[Config]:
    """Only the depth of the pipeline is left to measuring.

    Raises:
        RuntimeError: the device has too little shared memory for the shallowest pipeline.
    """
    weights = base_dtype.itemsize, delta_dtype.itemsize
    out, width, inner, warps = tile(rows, x_dtype.itemsize, max(weights), aligned)
    sizes = x_dtype.itemsize, sum(weights)
    configs = [Config(out, width, inner, warps, stages) for stages in STAGES]
    what = f"{delta_dtype} deltas need"
    return fitting("row_linear", what, configs, lambda c: needed_shared_memory(c, *sizes), limit)


def _launch(op, x, base, deltas, coefficients, bias, other, experts, transpose, tf32):
    layer = linear_arguments(op, x, base, deltas, coefficients, bias, transpose, other)
    x, rows, inner, outer, dtypes = layer.x, layer.rows, layer.inner, layer.outer, layer.dtypes
    check_shape(op, "coefficients", coefficients, [rows, len(deltas)])
    other = None if other is None else by_rows(other)
    aligned = layer.aligned and (other is None or is_aligned(other))
    configs = configurations(rows, *dtypes, aligned, device_limits(x.device)[1])
    y = torch.empty(rows, outer, dtype=x.dtype, device=x.device)
    if rows == 0 or outer == 0:
        return y, torch.zeros(rows, len(deltas), dtype=torch.float32, device=x.device)
    out_tiles = cdiv(outer, configs[0].out)
    dots = None
    if other is not None:
        shape = out_tiles, rows, len(deltas)
        dots = torch.empty(shape, dtype=torch.float32, device=x.device)
    other_strides = (0, 0) if other is None else other.stride()

    def launch(config: Config) -> None:
        _row_linear_kernel[(cdiv(rows, config.rows) * out_tiles,)](
            x,
            layer.base,
            layer.deltas,
            layer.coefficients,
            layer.bias,
            other,
            y,
            dots,
            rows,
            inner,
            outer,
            *x.stride(),
            *layer.strides,
            *other_strides,
            COUNT=len(deltas),
            EXPERTS=experts,
            HAS_BIAS=bias is not None,
            HAS_DOTS=dots is not None,
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_O=config.out,
            BLOCK_R=config.rows,
            BLOCK_I=config.inner,
            **config.launch,
        )

    key = (op, dtypes, len(deltas), experts, tf32)
    run(x, (*key, layer.strides[1] == 1, power_of_two(rows), inner, outer), configs, launch)
    return y, None if dots is None else sum_partials(dots)


def row_linear_forward(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    bias: Tensor | None,
    experts: bool,
    transpose: bool,
    tf32: bool = False,
) -> Tensor:
    """y_r = (base + sum_k lambda_rk tau_k) x_r + bias, without any merged weight.

    Args:
        x: [R, I], fp32/fp16/bf16, any strides.
        base: [O, I], or [I, O] with `transpose`; fp32/fp16/bf16.
        deltas: K <= 32 tensors of base's shape and one dtype: experts e_k (tau_k = e_k - base)
            or task vectors tau_k. tau_k is rounded once to x's dtype.
        coefficients: [R, K].
        bias: [O] or None, added in fp32.
        experts: whether the deltas are experts.
        transpose: whether base and deltas are stored as [I, O].
        tf32: let fp32 products run in tf32.

    Returns:
        [R, O] in x's dtype.

    Raises:
        RuntimeError: a dtype, device, shape, K or the device's shared memory does not fit.
    """
    op = "row_linear_forward"
    return _launch(op, x, base, deltas, coefficients, bias, None, experts, transpose, tf32)[0]


def row_linear_backward(
    dy: Tensor,
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    experts: bool,
    transpose: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """dx_r = (base + sum_k lambda_rk tau_k)^T dy_r and dlambda_rk = dy_r . (tau_k x_r).

    Args:
        dy: [R, O], fp32/fp16/bf16, any strides.
        x: [R, I].
        base, deltas, coefficients, experts, transpose, tf32: as for `row_linear_forward`.

    Returns:
        dx [R, I] in dy's dtype and dlambda [R, K] fp32.

    Raises:
        RuntimeError: as for `row_linear_forward`.
    """
    op = "row_linear_backward"
    return _launch(op, dy, base, deltas, coefficients, None, x, experts, not transpose, tf32)
