"""Linear layer of masked task vectors: y_r = (base + sum_k lambda_rk mask_k unified) x_r + b.

Rows come in samples that share their coefficients. A first kernel sorts samples by the task they
use, so that most tiles of rows have one task: such a tile walks the weight once, each tile of
base + lambda unified (where mask) made in registers from one byte for eight entries. A tile of a
few tasks walks once for each. Where a row uses several tasks, or rows of one task scale it
differently, base and the masked vectors take turns and each product is scaled per row. Which of
the two is decided on the device, tile by tile: the host never waits for the coefficients.

The backward pass is the same walk with the weight's sides exchanged; dlambda_rk is the dot of x_r
with the k-th product, added over tiles in a fixed order by another kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import (
    Config,
    by_rows,
    cdiv,
    check,
    check_masks,
    check_shape,
    device_limits,
    fitting,
    is_aligned,
    on_device,
    power_of_two,
    run,
)
from .partial_sums import sum_partials
from .tiles import expanded_bits

SORTED_SAMPLES = 64  # that one program places, and that it compares them with at a time
ORDER_WARPS = 4


@triton.jit
def _task_keys(coefficients_ptr, sample, samples, stride_ls, stride_lk, COUNT: tl.constexpr):
    """0 for a sample that uses no task, 1 + k for task k alone, COUNT + 1 for several; int32."""
    key = tl.zeros_like(sample)
    for k in range(COUNT):
        offsets = sample.to(tl.int64) * stride_ls + k * stride_lk
        used = tl.load(coefficients_ptr + offsets, mask=sample < samples, other=0.0) != 0
        key = tl.where(used, tl.where(key == 0, k + 1, COUNT + 1), key)
    return key


@triton.jit
def _order_kernel(
    coefficients_ptr,
    order_ptr,
    samples,
    stride_ls,
    stride_lk,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """order[place] = sample, stably by key: a sample's place is how many come before it."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own_key = _task_keys(coefficients_ptr, own, samples, stride_ls, stride_lk, COUNT)
    place = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, samples, BLOCK):
        other = start + tl.arange(0, BLOCK)
        key = _task_keys(coefficients_ptr, other, samples, stride_ls, stride_lk, COUNT)
        equal = (key[None, :] == own_key[:, None]) & (other[None, :] < own[:, None])
        before = ((key[None, :] < own_key[:, None]) | equal) & (other < samples)[None, :]
        place += tl.sum(before.to(tl.int32), axis=1)
    tl.store(order_ptr + place, own, mask=own < samples)


@triton.jit
def _product_tile(
    x_ptr,
    base_ptr,
    unified_ptr,
    mask_ptr,
    factor,
    with_base,
    with_mask,
    steps,
    o,
    packed_o,
    r,
    used,
    inner,
    outer,
    packed,
    stride_xr,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_mo,
    stride_mi,
    PACKED_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """(base + factor unified where mask) x over `steps` blocks of I, for rows that are `used`."""
    i = tl.arange(0, BLOCK_I).to(tl.int64)
    x_offsets = r[None, :] * stride_xr + i[:, None] * stride_xi  # [I, R]
    w_offsets = o[:, None] * stride_wo + i[None, :] * stride_wi  # [O, I]
    if PACKED_INNER:
        m_outer, m_inner = o, tl.arange(0, BLOCK_I // 8).to(tl.int64)
        outer_end, inner_end = outer, packed
        m_step = tl.full([], BLOCK_I // 8, tl.int64)
    else:
        m_outer, m_inner = packed_o, i
        outer_end, inner_end = packed, inner
        m_step = tl.full([], BLOCK_I, tl.int64)
    m_offsets = m_outer[:, None] * stride_mo + m_inner[None, :] * stride_mi
    step = tl.full([], BLOCK_I, tl.int64)
    m_mask = (m_outer[:, None] < outer_end) & (m_inner[None, :] < inner_end) & with_mask
    following = tl.load(mask_ptr + m_offsets, mask=m_mask, other=0)
    accumulator = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    for _ in range(steps):
        w_mask = (o[:, None] < outer) & (i[None, :] < inner)
        x_mask = (i[:, None] < inner) & used[None, :]
        base = tl.load(base_ptr + w_offsets, mask=w_mask & with_base, other=0.0)
        unified = tl.load(unified_ptr + w_offsets, mask=w_mask & with_mask, other=0.0)
        x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0.0)
        chosen = expanded_bits(following, BLOCK_O, BLOCK_I, PACKED_INNER)
        # Bytes are too few for the compiler's pipeline: the next ones are under way by hand.
        m_inner += m_step
        m_offsets += m_step * stride_mi
        m_mask = (m_outer[:, None] < outer_end) & (m_inner[None, :] < inner_end) & with_mask
        following = tl.load(mask_ptr + m_offsets, mask=m_mask, other=0)
        base = base.to(tl.float32)
        weight = tl.where(chosen, tl.fma(unified.to(tl.float32), factor, base), base)
        accumulator = tl.dot(weight.to(x.dtype), x, accumulator, input_precision=PRECISION)
        i += step
        x_offsets += step * stride_xi
        w_offsets += step * stride_wi
    return accumulator


@triton.jit
def _masked_linear_kernel(
    x_ptr,
    base_ptr,
    unified_ptr,
    masks_ptr,
    coefficients_ptr,
    order_ptr,
    bias_ptr,
    other_ptr,
    y_ptr,
    dots_ptr,
    rows,
    inner,
    outer,
    packed,
    sample_rows,
    stride_xr,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_mk,
    stride_mo,
    stride_mi,
    stride_ls,
    stride_lk,
    stride_or,
    stride_oo,
    COUNT: tl.constexpr,
    PACKED_INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # Neighbouring programs share the weight tiles, the larger part of the traffic.
    row_tiles = tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0)
    out_tile = (tile // row_tiles).to(tl.int64)
    o = out_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    packed_o = out_tile * (BLOCK_O // 8) + tl.arange(0, BLOCK_O // 8)
    position = (tile % row_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = position < rows
    sample = position // sample_rows
    if order_ptr is not None:
        sample = tl.load(order_ptr + sample, mask=inside, other=0).to(tl.int64)
    r = sample * sample_rows + position % sample_rows
    lambda_ptr = coefficients_ptr + sample * stride_ls

    tasks = tl.zeros([BLOCK_R], dtype=tl.int32)  # that each row uses
    shared = tl.full([], True, tl.int1)  # whether all rows of a task have one coefficient
    for k in range(COUNT):
        scale = tl.load(lambda_ptr + k * stride_lk, mask=inside, other=0.0)
        tasks += (scale != 0).to(tl.int32)
        most = tl.max(tl.where(scale != 0, scale, float("-inf")), axis=0)
        differs = (scale != 0) & (scale != most)
        shared = shared & (tl.max(differs.to(tl.int32), axis=0) == 0)
    merge = shared & (tl.max(tasks, axis=0) <= 1)
    if HAS_DOTS:
        merge = tl.full([], False, tl.int1)

    total = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    for walk in range(COUNT + 1):  # the base alone, then every task
        k = walk - 1
        with_mask = walk > 0
        scale = tl.load(lambda_ptr + k * stride_lk, mask=inside & with_mask, other=0.0)
        factor = tl.max(tl.where(scale != 0, scale, float("-inf")), axis=0)
        factor = tl.where(merge, factor, 1.0)
        if walk == 0:
            scale = (inside & ((tasks == 0) | (merge == 0))).to(tl.float32)
        scale = tl.where(merge & with_mask, (scale != 0).to(tl.float32), scale)
        used = scale != 0
        if HAS_DOTS:
            used = inside
        steps = tl.cdiv(inner, BLOCK_I) * tl.max(used.to(tl.int32), axis=0)
        product = _product_tile(
            x_ptr,
            base_ptr,
            unified_ptr,
            masks_ptr + k.to(tl.int64) * stride_mk,
            factor,
            merge | (walk == 0),
            with_mask,
            steps,
            o,
            packed_o,
            r,
            used,
            inner,
            outer,
            packed,
            stride_xr,
            stride_xi,
            stride_wo,
            stride_wi,
            stride_mo,
            stride_mi,
            PACKED_INNER,
            PRECISION,
            BLOCK_O,
            BLOCK_R,
            BLOCK_I,
        )
        # where, because the product with a task that a row does not use may be NaN
        total = tl.where((scale != 0)[None, :], tl.fma(product, scale[None, :], total), total)
        if HAS_DOTS:
            mask = (o[:, None] < outer) & inside[None, :]
            other_offsets = r[None, :] * stride_or + o[:, None] * stride_oo
            other = tl.load(other_ptr + other_offsets, mask=mask & with_mask, other=0.0)
            dots = tl.sum(product * other.to(tl.float32), axis=0)  # [R]
            dots_mask = inside & with_mask
            tl.store(dots_ptr + (out_tile * rows + r) * COUNT + k, dots, mask=dots_mask)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o < outer, other=0.0).to(tl.float32)
        total += bias[:, None]
    y_mask = (o[:, None] < outer) & inside[None, :]
    y_offsets = r[None, :] * outer + o[:, None]
    tl.store(y_ptr + y_offsets, total.to(y_ptr.dtype.element_ty), mask=y_mask)


STAGES = (3, 2)


def tile(rows: int, x_bytes: int, weight_bytes: int, aligned: bool) -> tuple[int, int, int, int]:
    """(out, rows, inner, warps): a rule of row count and dtypes, so the order of sums is one.

    Many rows share a tile, because its weights are made anew for every tile of rows. What is not
    `aligned` is read element by element, which takes an address for each.
    """
    width = min(64, max(16, power_of_two(rows)))
    if x_bytes == 4 or not aligned:
        return 64, min(32 if aligned or x_bytes == 2 else 16, width), 16, 8
    if rows > 512 and weight_bytes == 2:
        return 64, 128, 32, 8
    return 64, width, 64, 8


def needed_shared_memory(config: Config, x_bytes: int, weight_bytes: int) -> int:
    """Upper bound of a block's shared memory; `weight_bytes`: base and unified vector."""
    weights = config.out * ((config.stages - 1) * weight_bytes + x_bytes + 1)
    inputs = config.inner * (weights + config.rows * config.stages * x_bytes)
    return max(inputs, config.out * config.rows * 4)


def configurations(
    rows: int,
    x_dtype: torch.dtype,
    base_dtype: torch.dtype,
    unified_dtype: torch.dtype,
    aligned: bool,
    limit: int,
) -> list[Config]:
    """Only the depth of the pipeline is left to measuring.

    Raises:
        RuntimeError: the device has too little shared memory for the shallowest pipeline.
    """
    weights = base_dtype.itemsize, unified_dtype.itemsize
    out, width, inner, warps = tile(rows, x_dtype.itemsize, max(weights), aligned)
    sizes = x_dtype.itemsize, sum(weights)
    configs = [Config(out, width, inner, warps, stages) for stages in STAGES]
    what = f"masks of {unified_dtype} need"
    return fitting("masked_linear", what, configs, lambda c: needed_shared_memory(c, *sizes), limit)


def task_order(coefficients: Tensor) -> Tensor | None:
    """int32 [S]: samples of no task, then those of each task alone, then the others; each in their
    order. None for a single sample.

    Args:
        coefficients: fp32 [S, K].
    """
    samples, count = coefficients.shape
    if samples < 2:
        return None
    order = torch.empty(samples, dtype=torch.int32, device=coefficients.device)
    with on_device(coefficients):
        _order_kernel[(cdiv(samples, SORTED_SAMPLES),)](
            coefficients,
            order,
            samples,
            *coefficients.stride(),
            COUNT=count,
            BLOCK=SORTED_SAMPLES,
            num_warps=ORDER_WARPS,
        )
    return order


def _launch(op, x, base, unified, masks, coefficients, bias, other, transpose, tf32):
    named = {"base": base, "coefficients": coefficients, "bias": bias, "other": other}
    check(op, {"x": x, **named}, [unified])
    (height, width), rows, (samples, count) = base.shape, x.shape[0], coefficients.shape
    inner, outer = (height, width) if transpose else (width, height)
    check_shape(op, "x", x, [rows, inner])
    check_shape(op, "unified", unified, [height, width])
    check_masks(op, masks, [count, height, cdiv(width, 8)], x.device)
    check_shape(op, "bias", bias, [outer])
    check_shape(op, "other", other, [rows, outer])
    if rows and (samples == 0 or rows % samples):
        raise RuntimeError(f"{op}: {samples} rows of coefficients do not divide {rows} rows of x")
    x, base, unified = by_rows(x), base.contiguous(), unified.contiguous()
    masks = masks if masks.stride(2) == 1 else masks.contiguous()
    coefficients = coefficients.float()
    other = None if other is None else by_rows(other)
    aligned = is_aligned(x, base, unified) and (other is None or is_aligned(other))
    dtypes = x.dtype, base.dtype, unified.dtype
    configs = configurations(rows, *dtypes, aligned, device_limits(x.device)[1])
    y = torch.empty(rows, outer, dtype=x.dtype, device=x.device)
    if rows == 0 or outer == 0:
        return y, torch.zeros(rows, count, dtype=torch.float32, device=x.device)
    out_tiles = cdiv(outer, configs[0].out)
    dots = None
    if other is not None:
        dots = torch.empty(out_tiles, rows, count, dtype=torch.float32, device=x.device)
    order = task_order(coefficients)
    bias = None if bias is None else bias.contiguous()
    strides, mask_strides = base.stride(), masks.stride()[1:]
    if transpose:
        strides, mask_strides = strides[::-1], mask_strides[::-1]

    def launch(config: Config) -> None:
        _masked_linear_kernel[(cdiv(rows, config.rows) * out_tiles,)](
            x,
            base,
            unified,
            masks,
            coefficients,
            order,
            bias,
            other,
            y,
            dots,
            rows,
            inner,
            outer,
            masks.shape[2],
            rows // samples,
            *x.stride(),
            *strides,
            masks.stride(0),
            *mask_strides,
            *coefficients.stride(),
            *((0, 0) if other is None else other.stride()),
            COUNT=count,
            PACKED_INNER=not transpose,
            HAS_BIAS=bias is not None,
            HAS_DOTS=dots is not None,
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_O=config.out,
            BLOCK_R=config.rows,
            BLOCK_I=config.inner,
            **config.launch,
        )

    key = (op, dtypes, count, samples > 1, transpose, aligned, tf32, power_of_two(rows))
    run(x, (*key, inner, outer), configs, launch)
    return y, None if dots is None else sum_partials(dots)


def masked_linear_forward(
    x: Tensor,
    base: Tensor,
    unified: Tensor,
    masks: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    transpose: bool,
    tf32: bool = False,
) -> Tensor:
    """y_r = (base + sum_k lambda_sk mask_k unified) x_r + bias for the rows r of sample s.

    Rows of one task have its weight rounded once to x's dtype; of several, base and the masked
    vectors each. dX of the same layer is this of dY with `transpose` the other way.

    Args:
        x: [R, I], fp32/fp16/bf16, any strides; R / S rows of every sample one after the other.
        base, unified: [O, I], or [I, O] with `transpose`; fp32/fp16/bf16.
        masks: uint8 [K, base.shape[0], ceil(base.shape[1] / 8)], low bits first.
        coefficients: [S, K], any strides; 0 leaves a task out.
        bias: [O] or None, added in fp32.
        transpose: whether base, unified and masks are stored as [I, O].
        tf32: let fp32 products run in tf32.

    Returns:
        [R, O] in x's dtype.

    Raises:
        RuntimeError: a dtype, device, shape or the device's shared memory does not fit.
    """
    op = "masked_linear_forward"
    return _launch(op, x, base, unified, masks, coefficients, bias, None, transpose, tf32)[0]


def masked_linear_backward(
    dy: Tensor,
    x: Tensor,
    base: Tensor,
    unified: Tensor,
    masks: Tensor,
    coefficients: Tensor,
    transpose: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """dx_r = W_s^T dy_r and dlambda_rk = dy_r . ((mask_k unified) x_r).

    Args:
        dy: [R, O], fp32/fp16/bf16, any strides.
        x: [R, I].
        base, unified, masks, coefficients, transpose, tf32: as for `masked_linear_forward`.

    Returns:
        dx [R, I] in dy's dtype and dlambda [R, K] fp32, of every row.

    Raises:
        RuntimeError: as for `masked_linear_forward`.
    """
    op = "masked_linear_backward"
    return _launch(op, dy, base, unified, masks, coefficients, None, x, not transpose, tf32)
