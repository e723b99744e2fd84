"""Linear layer with row coefficients of low-rank deltas: y = x W^T + ((x V^T) * scale) U^T + b.

The first kernel multiplies x with the down factors V of all experts side by side and scales each
row by its coefficients; a tile whose coefficients are all 0 multiplies nothing and says so. The
second adds x W^T and the product with the up factors U, but for those tiles, in one accumulator
that is rounded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import (
    Config,
    by_rows,
    cdiv,
    check,
    check_shape,
    choose,
    device_limits,
    is_aligned,
    on_device,
    power_of_two,
)
from .tiles import add_product

COLUMNS = 64  # of the thin product in one tile; `inner` divides it
OP = "lowrank_linear_forward"


@triton.jit
def _thin_kernel(
    x_ptr,
    down_ptr,
    coefficients_ptr,
    thin_ptr,
    used_ptr,
    ends,
    rows,
    inner,
    total,
    stride_xr,
    stride_xi,
    stride_do,
    stride_di,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    column_tiles = tl.cdiv(total, BLOCK_O)
    tile = tl.program_id(0)
    c = (tile % column_tiles).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = (tile // column_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    owner = tl.zeros([BLOCK_O], dtype=tl.int32)  # the expert of each column
    for k in tl.static_range(COUNT):
        owner += (c.to(tl.float32) >= ends[k]).to(tl.int32)
    mask = (c[:, None] < total) & (r[None, :] < rows)
    scale_offsets = r[None, :] * COUNT + owner[:, None]
    scale = tl.load(coefficients_ptr + scale_offsets, mask=mask, other=0.0)
    used = tl.max(tl.max((scale != 0).to(tl.int32), axis=1), axis=0)
    product = add_product(
        tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32),
        down_ptr,
        x_ptr,
        c,
        r,
        0,
        tl.cdiv(inner, BLOCK_I) * used,
        total,
        rows,
        inner,
        stride_do,
        stride_di,
        stride_xr,
        stride_xi,
        PRECISION,
        BLOCK_I,
    )
    # where, because the product of an expert that a row does not use may be NaN
    thin = tl.where(scale != 0, product * scale, 0.0)
    thin_offsets = r[None, :] * total + c[:, None]
    tl.store(thin_ptr + thin_offsets, thin.to(thin_ptr.dtype.element_ty), mask=mask)
    tl.store(used_ptr + tile, used)


@triton.jit
def _lowrank_linear_kernel(
    x_ptr,
    base_ptr,
    thin_ptr,
    up_ptr,
    used_ptr,
    bias_ptr,
    y_ptr,
    rows,
    inner,
    outer,
    total,
    stride_xr,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_uo,
    stride_ui,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0)
    row_tile = tile % row_tiles
    o = (tile // row_tiles).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = row_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    y = add_product(
        tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32),
        base_ptr,
        x_ptr,
        o,
        r,
        0,
        tl.cdiv(inner, BLOCK_I),
        outer,
        rows,
        inner,
        stride_wo,
        stride_wi,
        stride_xr,
        stride_xi,
        PRECISION,
        BLOCK_I,
    )
    column_tiles = tl.cdiv(total, BLOCK_C)
    for column in range(column_tiles):
        used = tl.load(used_ptr + row_tile * column_tiles + column)
        y = add_product(
            y,
            up_ptr,
            thin_ptr,
            o,
            r,
            column * BLOCK_C,
            used * (BLOCK_C // BLOCK_I),
            outer,
            rows,
            total,
            stride_uo,
            stride_ui,
            total,
            1,
            PRECISION,
            BLOCK_I,
        )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o < outer, other=0.0).to(tl.float32)
        y += bias[:, None]
    mask = (o[:, None] < outer) & (r[None, :] < rows)
    y_offsets = r[None, :] * outer + o[:, None]
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


STAGES = (3, 2)


def tile(rows: int, x_bytes: int, weight_bytes: int, aligned: bool) -> tuple[int, int, int, int]:
    """(out, rows, inner, warps): a rule of row count and dtypes, so the order of sums is one."""
    width = min(64, max(16, power_of_two(rows)))
    if x_bytes == 4 or not aligned:
        return 64, min(32, width), 16, 8
    if rows > 512 and weight_bytes == 2:
        return 128, 64, 64, 8
    return 64, width, 64, 8 if width == 64 or weight_bytes == 4 else 4


def needed_shared_memory(config: Config, x_bytes: int, weight_bytes: int) -> int:
    """Upper bound of a block's shared memory; `weight_bytes`: of the widest weight."""
    weights = config.out * (config.stages * weight_bytes + x_bytes)
    inputs = config.inner * (weights + config.rows * config.stages * x_bytes)
    return max(inputs, config.out * config.rows * 4)


def configurations(
    rows: int, x_dtype: torch.dtype, weight_dtypes: Sequence[torch.dtype], aligned: bool, limit: int
) -> list[Config]:
    """Only the depth of the pipeline is left to measuring; the shallowest fits every device."""
    weight_bytes = max(dtype.itemsize for dtype in weight_dtypes)
    shape = tile(rows, x_dtype.itemsize, weight_bytes, aligned)
    configs = [Config(*shape, stages) for stages in STAGES]
    sizes = x_dtype.itemsize, weight_bytes
    fitting = [config for config in configs if needed_shared_memory(config, *sizes) <= limit]
    return fitting or configs[-1:]


def lowrank_linear_forward(
    x: Tensor,
    base: Tensor,
    down: Tensor,
    up: Tensor,
    ranks: Sequence[int],
    coefficients: Tensor,
    bias: Tensor | None,
    tf32: bool = False,
) -> Tensor:
    """y_r = (base + sum_k lambda_rk up_k down_k) x_r + bias, without any merged weight.

    dX of the same layer is this of dY with base^T, up^T and down^T.

    Args:
        x: [R, I], fp32/fp16/bf16, any strides.
        base: [O, I], any strides.
        down: [C, I], C the sum of the K ranks, any strides; its product with x is scaled in fp32
            and rounded once to x's dtype.
        up: [O, C], any strides.
        ranks: K ranks.
        coefficients: [R, K].
        bias: [O] or None, added in fp32.
        tf32: let fp32 products run in tf32.

    Returns:
        [R, O] in x's dtype.

    Raises:
        RuntimeError: a dtype, device or shape does not fit.
    """
    named = {"base": base, "down": down, "up": up, "coefficients": coefficients, "bias": bias}
    check(OP, {"x": x, **named})
    (outer, inner), total, rows = base.shape, sum(ranks), x.shape[0]
    check_shape(OP, "x", x, [rows, inner])
    check_shape(OP, "down", down, [total, inner])
    check_shape(OP, "up", up, [outer, total])
    check_shape(OP, "coefficients", coefficients, [rows, len(ranks)])
    check_shape(OP, "bias", bias, [outer])
    dtypes = base.dtype, down.dtype, up.dtype
    x = by_rows(x)
    aligned = is_aligned(x, base, down, up)
    configs = configurations(rows, x.dtype, dtypes, aligned, device_limits(x.device)[1])
    y = torch.empty(rows, outer, dtype=x.dtype, device=x.device)
    if rows == 0 or outer == 0:
        return y
    # As arguments, because a copy from the host would wait for the device; as floats, because
    # Triton compiles a kernel for every pattern of ones and multiples of 16 among whole numbers.
    ends = tuple(map(float, itertools.accumulate(ranks)))
    coefficients = coefficients.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    thin = torch.empty(rows, total, dtype=x.dtype, device=x.device)
    tiles = cdiv(rows, configs[0].rows), cdiv(total, COLUMNS)
    used = torch.empty(tiles, dtype=torch.int32, device=x.device)
    precision = "tf32" if tf32 else "ieee"

    def launch(config: Config) -> None:
        blocks = {"BLOCK_R": config.rows, "BLOCK_I": config.inner, "PRECISION": precision}
        if total:
            _thin_kernel[(tiles[0] * tiles[1],)](
                x,
                down,
                coefficients,
                thin,
                used,
                ends,
                rows,
                inner,
                total,
                *x.stride(),
                *down.stride(),
                COUNT=len(ranks),
                BLOCK_O=COLUMNS,
                **blocks,
                **config.launch,
            )
        _lowrank_linear_kernel[(tiles[0] * cdiv(outer, config.out),)](
            x,
            base,
            thin,
            up,
            used,
            bias,
            y,
            rows,
            inner,
            outer,
            total,
            *x.stride(),
            *base.stride(),
            *up.stride(),
            HAS_BIAS=bias is not None,
            BLOCK_O=config.out,
            BLOCK_C=COLUMNS,
            **blocks,
            **config.launch,
        )

    with on_device(x):
        key = (OP, x.device, x.dtype, dtypes, tuple(ranks), tf32, base.stride(1) == 1, aligned)
        key += (power_of_two(rows), inner, outer)
        launch(choose(key, configs, launch))
    return y
