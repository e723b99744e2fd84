"""Low-rank adapters of each sample's task: y = x - relu(x V_t^T) U_t^T.

A program takes rows of one sample, whose task it looks up, so a mixed batch needs no sorting and no
look at the tasks by the host. The thin product stays in registers; x is read twice, the second time
from cache.
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
    check_shape,
    choose,
    device_limits,
    is_aligned,
    on_device,
    power_of_two,
)
from .tiles import add_product

MAX_RANK = 64
OP = "residual_adapter_forward"


@triton.jit
def _residual_adapter_kernel(
    x_ptr,
    down_ptr,
    up_ptr,
    tasks_ptr,
    y_ptr,
    rows,
    width,
    rank,
    count,
    stride_xr,
    stride_xi,
    stride_dk,
    stride_dr,
    stride_di,
    stride_uk,
    stride_uo,
    stride_ur,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_R)
    sample = (tl.program_id(0) // row_tiles).to(tl.int64)
    r = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    task = tl.load(tasks_ptr + sample)
    known = (task >= 0) & (task < count)
    task = tl.where(known, task, 0)
    x_ptr += sample * rows * stride_xr
    y_ptr += sample * rows * width
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    thin = add_product(
        tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32),
        down_ptr + task * stride_dk,
        x_ptr,
        c,
        r,
        0,
        tl.cdiv(width, BLOCK_I),
        rank,
        rows,
        width,
        stride_dr,
        stride_di,
        stride_xr,
        stride_xi,
        PRECISION,
        BLOCK_I,
    )
    thin = tl.where(thin < 0, 0.0, thin)  # and not maximum, which may drop a NaN
    thin = tl.where(known, thin, float("nan")).to(x_ptr.dtype.element_ty)
    up_ptr += task * stride_uk
    o = tl.arange(0, BLOCK_O).to(tl.int64)
    for _ in range(tl.cdiv(width, BLOCK_O)):
        up_mask = (o[:, None] < width) & (c[None, :] < rank)
        up_offsets = o[:, None] * stride_uo + c[None, :] * stride_ur
        up = tl.load(up_ptr + up_offsets, mask=up_mask, other=0.0).to(thin.dtype)
        product = tl.dot(up, thin, input_precision=PRECISION)
        mask = (o[:, None] < width) & (r[None, :] < rows)
        x_offsets = r[None, :] * stride_xr + o[:, None] * stride_xi
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
        y = (x.to(tl.float32) - product).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + r[None, :] * width + o[:, None], y, mask=mask)
        o += BLOCK_O


STAGES = (3, 2)


def tile(rows: int, x_bytes: int, aligned: bool) -> tuple[int, int, int, int]:
    """(out, rows, inner, warps): a rule of a sample's rows and dtypes, so sums have one order."""
    height = min(64, max(16, power_of_two(rows)))
    if x_bytes == 4 or not aligned:
        return 64, min(32, height), 16, 8
    return 64, height, 64, 4


def needed_shared_memory(config: Config, rank: int, x_bytes: int, weight_bytes: int) -> int:
    """Upper bound of a block's shared memory; `weight_bytes`: of the wider factor."""
    columns = thin_columns(rank)
    weights = config.stages * weight_bytes + x_bytes
    first = config.inner * (columns * weights + config.rows * config.stages * x_bytes)
    second = config.out * (columns * weights + config.rows * max(4, config.stages * x_bytes))
    return max(first, second) + columns * config.rows * 4


def thin_columns(rank: int) -> int:
    """Columns of the thin product's tile: a matrix instruction has at least 16."""
    return max(16, power_of_two(rank))


def configurations(
    rows: int, rank: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, aligned: bool, limit: int
) -> list[Config]:
    """Only the depth of the pipeline is left to measuring; the shallowest fits every device."""
    shape = tile(rows, x_dtype.itemsize, aligned)
    configs = [Config(*shape, stages) for stages in STAGES]
    sizes = x_dtype.itemsize, weight_dtype.itemsize
    fitting = [c for c in configs if needed_shared_memory(c, rank, *sizes) <= limit]
    return fitting or configs[-1:]


def residual_adapter_forward(
    x: Tensor, down: Tensor, up: Tensor, tasks: Tensor, tf32: bool = False
) -> Tensor:
    """y_sn = x_sn - up_t relu(down_t x_sn), t the task of sample s.

    Args:
        x: [S, N, d], fp32/fp16/bf16, any strides.
        down: [K, rank, d], any strides.
        up: [K, d, rank], any strides; the thin product is rounded once to x's dtype.
        tasks: int64 [S]; rows of a task that is not in 0..K-1 become NaN.
        tf32: let fp32 products run in tf32.

    Returns:
        [S, N, d] in x's dtype.

    Raises:
        RuntimeError: a dtype, device or shape does not fit, or the rank is over `MAX_RANK`.
    """
    check(OP, {"x": x, "down": down, "up": up})
    (samples, rows, width), (count, rank, _) = x.shape, down.shape
    check_shape(OP, "down", down, [count, rank, width])
    check_shape(OP, "up", up, [count, width, rank])
    check_shape(OP, "tasks", tasks, [samples])
    if rank > MAX_RANK:
        raise RuntimeError(f"{OP}: rank {rank}, expected at most {MAX_RANK}")
    x = by_rows(x.reshape(samples * rows, width))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y.view(samples, rows, width)
    weight_dtype = max(down.dtype, up.dtype, key=lambda dtype: dtype.itemsize)
    aligned = is_aligned(x, down[0], up[0])
    limit = device_limits(x.device)[1]
    configs = configurations(rows, rank, x.dtype, weight_dtype, aligned, limit)
    tasks = tasks.contiguous()

    def launch(config: Config) -> None:
        _residual_adapter_kernel[(samples * cdiv(rows, config.rows),)](
            x,
            down,
            up,
            tasks,
            y,
            rows,
            width,
            rank,
            count,
            *x.stride(),
            *down.stride(),
            *up.stride(),
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_O=config.out,
            BLOCK_R=config.rows,
            BLOCK_I=config.inner,
            BLOCK_C=thin_columns(rank),
            **config.launch,
        )

    with on_device(x):
        key = (OP, x.device, x.dtype, down.dtype, up.dtype, tf32, aligned, rank, width)
        launch(choose((*key, power_of_two(rows), power_of_two(samples)), configs, launch))
    return y.view(samples, rows, width)
