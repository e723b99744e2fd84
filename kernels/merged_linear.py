"""Merged linear by the fused strategy: the merged tile exists in registers only.

The kernel computes Y^T = W X^T, so that the tile of W just merged is the first operand of the
matrix instruction, which wgmma takes from registers. dX = dY W is the same kernel with the
weight's strides exchanged. Accumulation is fp32; the merged tile is rounded once to x's dtype
before the product and the result once after it. Few rows leave most of the GPU idle, so the inner
dimension is then split over programs whose fp32 partial results are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import (
    Config,
    cdiv,
    check_shape,
    device_limits,
    fitting,
    linear_arguments,
    power_of_two,
    run,
)
from .partial_sums import sum_partials
from .tiles import merged_tile


@triton.jit
def _merged_linear_kernel(
    x_ptr,
    base_ptr,
    delta_ptrs,
    coefficients_ptr,
    bias_ptr,
    y_ptr,
    rows,
    inner,
    outer,
    steps,
    stride_xr,
    stride_xi,
    stride_wo,
    stride_wi,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # Neighbouring programs share the weight tiles, the larger part of the traffic.
    row_tiles = tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    o = (tile // row_tiles).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = (tile % row_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = split * steps * BLOCK_I + tl.arange(0, BLOCK_I)
    x_offsets = r[None, :] * stride_xr + i[:, None] * stride_xi  # [I, R]
    w_offsets = o[:, None] * stride_wo + i[None, :] * stride_wi  # [O, I]
    step = tl.full([], BLOCK_I, tl.int64)
    accumulator = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    for _ in range(steps):
        w_mask = (o[:, None] < outer) & (i[None, :] < inner)
        x_mask = (i[:, None] < inner) & (r[None, :] < rows)
        merged = merged_tile(
            base_ptr, delta_ptrs, coefficients_ptr, w_offsets, w_mask, COUNT, GROUP, EXPERTS
        )
        x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0.0)
        accumulator = tl.dot(merged.to(x.dtype), x, accumulator, input_precision=PRECISION)
        i += step
        x_offsets += step * stride_xi
        w_offsets += step * stride_wi
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o < outer, other=0.0).to(tl.float32)
        accumulator += bias[:, None]
    y_offsets = (split * rows + r[None, :]) * outer + o[:, None]
    y_mask = (o[:, None] < outer) & (r[None, :] < rows)
    tl.store(y_ptr + y_offsets, accumulator.to(y_ptr.dtype.element_ty), mask=y_mask)


# (out, rows, warps, stages) by the number of rows, best guess first. wgmma takes 64 rows of the
# merged tile per four warps; mma.sync has no such unit and needs more warps to stay in registers.
WGMMA_TILES = {
    16: ((64, 16, 4, 3), (64, 16, 4, 2), (128, 16, 8, 2)),
    32: ((64, 32, 4, 3), (64, 32, 4, 2), (128, 32, 8, 2)),
    64: ((64, 64, 4, 2), (128, 64, 8, 2)),
    128: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
}
MMA_TILES = {
    16: ((64, 16, 4, 2), (64, 16, 8, 2)),
    32: ((64, 32, 8, 2),),
    64: ((64, 64, 8, 2),),
    128: ((64, 64, 8, 2), (64, 128, 8, 2)),
}
FP32_TILES = {
    16: ((64, 16, 4, 2), (64, 16, 8, 2)),
    32: ((64, 32, 8, 2),),
    64: ((64, 64, 8, 2),),
    128: ((64, 64, 8, 2),),
}
WGMMA_CAPABILITIES = (9, 10)
# More sums a thread than these leave registers only for 16-bit weights of so many experts.
WIDE_TILE_SUMS = 32
WIDE_TILE_EXPERTS = 16
# Where every element takes an address: experts read at once, and activation rows of a tile, half
# of them for more than WIDE_TILE_EXPERTS.
UNALIGNED_GROUP = 2
UNALIGNED_ROWS = 32
SPLIT_ROWS = 64  # more rows than these fill the GPU without splitting
WANTED_PROGRAMS = 256
MAX_SPLITS = 16
MIN_STEPS = 4


def needed_shared_memory(config: Config, x_bytes: int, base_bytes: int, delta_bytes: int) -> int:
    """Upper bound of a block's shared memory; `delta_bytes`: of one entry of a group of deltas."""
    in_flight = (base_bytes + delta_bytes) * (config.stages - 1) + max(base_bytes, x_bytes)
    weights = config.out * config.inner * in_flight
    return weights + config.stages * config.inner * config.rows * x_bytes


def expert_group(count: int, aligned: bool) -> int:
    """Experts whose tiles are read at once."""
    return count if aligned else min(count, UNALIGNED_GROUP)


def inner_block(x_bytes: int, weight_bytes: int, count: int, aligned: bool) -> int:
    """Columns merged per step: the more experts, the narrower, to bound registers and memory.

    What is not `aligned` arrives element by element, which takes an address for each.
    """
    if not aligned:
        return 16
    widest = 64 if count <= 8 else 32 if count <= 16 else 16
    return max(16, widest * 2 // max(x_bytes, weight_bytes))


def configurations(
    rows: int,
    x_dtype: torch.dtype,
    base_dtype: torch.dtype,
    delta_dtype: torch.dtype,
    count: int,
    aligned: bool,
    capability: int,
    limit: int,
) -> list[Config]:
    """The configurations to choose from, best guess first; all write the same bytes.

    Args:
        aligned: whether weights and x can be copied 16 bytes at a time, see `is_aligned`.
        capability: major compute capability of the device.
        limit: bytes of shared memory a block may use there.

    Raises:
        RuntimeError: the device has too little shared memory for the smallest tile.
    """
    in_flight = expert_group(count, aligned) * delta_dtype.itemsize
    sizes = x_dtype.itemsize, base_dtype.itemsize, in_flight
    weight_bytes = max(base_dtype.itemsize, delta_dtype.itemsize)
    inner = inner_block(x_dtype.itemsize, weight_bytes, count, aligned)
    width = min(128, max(16, power_of_two(rows)))
    tiles = WGMMA_TILES if capability in WGMMA_CAPABILITIES else MMA_TILES
    tiles = FP32_TILES if x_dtype == torch.float32 else tiles
    unaligned_rows = UNALIGNED_ROWS if count <= WIDE_TILE_EXPERTS else 16
    table = tiles[width] if aligned else ((64, min(unaligned_rows, width), 8, 2),)
    configs = []
    for out, width, warps, stages in table:
        # Eight warps would copy a merged tile this small in pieces of less than 16 bytes.
        warps = 4 if aligned and out * inner * sizes[1] == 64 * 16 * 2 else warps
        narrow = out * width <= 32 * warps * WIDE_TILE_SUMS
        if narrow or (count <= WIDE_TILE_EXPERTS and weight_bytes == 2):
            configs.append(Config(out, width, inner, warps, stages))
    what = f"{count} deltas in {delta_dtype} need"
    return fitting("merged_linear", what, configs, lambda c: needed_shared_memory(c, *sizes), limit)


def split_count(rows: int, inner: int, outer: int, block: int) -> int:
    """Programs that share one output tile: a rule of the shape, not of the configuration."""
    if rows > SPLIT_ROWS:
        return 1
    return max(1, min(WANTED_PROGRAMS // cdiv(outer, 64), inner // (block * MIN_STEPS), MAX_SPLITS))


def _launch(op, x, base, deltas, coefficients, bias, experts, transpose, tf32):
    layer = linear_arguments(op, x, base, deltas, coefficients, bias, transpose)
    check_shape(op, "coefficients", coefficients, [len(deltas)])
    x, rows, inner, outer, dtypes = layer.x, layer.rows, layer.inner, layer.outer, layer.dtypes
    limits = device_limits(x.device)
    configs = configurations(rows, *dtypes, len(deltas), layer.aligned, *limits)
    group = expert_group(len(deltas), layer.aligned)
    y = torch.empty(rows, outer, dtype=x.dtype, device=x.device)
    if rows == 0 or outer == 0:
        return y
    splits = split_count(rows, inner, outer, configs[0].inner)
    steps = cdiv(cdiv(inner, configs[0].inner), splits)
    target = y
    if splits > 1:
        target = torch.empty(splits, rows, outer, dtype=torch.float32, device=x.device)
    fused_bias = layer.bias if splits == 1 else None

    def launch(config: Config) -> None:
        _merged_linear_kernel[(cdiv(rows, config.rows) * cdiv(outer, config.out), splits)](
            x,
            layer.base,
            layer.deltas,
            layer.coefficients,
            fused_bias,
            target,
            rows,
            inner,
            outer,
            steps,
            *x.stride(),
            *layer.strides,
            COUNT=len(deltas),
            GROUP=group,
            EXPERTS=experts,
            HAS_BIAS=fused_bias is not None,
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_O=config.out,
            BLOCK_R=config.rows,
            BLOCK_I=config.inner,
            **config.launch,
        )

    key = (op, dtypes, len(deltas), experts, tf32)
    run(x, (*key, layer.strides[1] == 1, power_of_two(rows), inner, outer), configs, launch)
    return y if splits == 1 else sum_partials(target, x.dtype, bias)


def merged_linear_forward(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    bias: Tensor | None,
    experts: bool,
    transpose: bool,
    tf32: bool = False,
) -> Tensor:
    """y = x W^T + bias with W = base + sum_k lambda_k tau_k, merged tile by tile in registers.

    Args:
        x: [R, I], fp32/fp16/bf16, any strides.
        base: [O, I], or [I, O] with `transpose`; fp32/fp16/bf16.
        deltas: K <= 32 tensors of base's shape and one dtype: experts e_k (tau_k = e_k - base)
            or task vectors tau_k.
        coefficients: [K].
        bias: [O] or None, added in fp32.
        experts: whether the deltas are experts.
        transpose: whether base and deltas are stored as [I, O].
        tf32: let fp32 products run in tf32.

    Returns:
        [R, O] in x's dtype.

    Raises:
        RuntimeError: a dtype, device, shape, K or the device's shared memory does not fit.
    """
    return _launch("merged_linear", x, base, deltas, coefficients, bias, experts, transpose, tf32)


def merged_linear_backward_x(
    dy: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    experts: bool,
    transpose: bool,
    tf32: bool = False,
) -> Tensor:
    """dX = dY W with W = base + sum_k lambda_k tau_k, merged tile by tile in registers.

    Args:
        dy: [R, O], fp32/fp16/bf16, any strides.
        base, deltas, coefficients, experts, transpose, tf32: as for `merged_linear_forward`.

    Returns:
        [R, I] in dy's dtype.

    Raises:
        RuntimeError: as for `merged_linear_forward`.
    """
    name = "merged_linear_backward_x"
    return _launch(name, dy, base, deltas, coefficients, None, experts, not transpose, tf32)
