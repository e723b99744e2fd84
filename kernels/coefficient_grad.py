"""Coefficient gradient of a linear layer: dlambda_k = <dY^T X, tau_k>, dW stays in registers.

Each program accumulates one tile of dY^T X over its share of the rows, in fp32, and meets the K
task-vector tiles there; only K numbers a program leave it. A second kernel adds them in a fixed
order. The tile and the share follow from the shape alone, so the bytes do not depend on measuring.
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
    check,
    check_deltas,
    check_shape,
    device_limits,
    fitting,
    is_aligned,
    like_layout,
    power_of_two,
    run,
)
from .partial_sums import sum_partials
from .tiles import nth_pointer, task_vector_tile


@triton.jit
def gradient_tile(
    left_ptr,
    right_ptr,
    first,
    last,
    share,
    o,
    i,
    outer,
    inner,
    stride_lr,
    stride_lo,
    stride_rr,
    stride_ri,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """left^T right [O, I] over the rows from `first` to `last`, at most `share`."""
    r = first + tl.arange(0, BLOCK_R)
    left_offsets = r[None, :] * stride_lr + o[:, None] * stride_lo  # [O, R]
    right_offsets = r[:, None] * stride_rr + i[None, :] * stride_ri  # [R, I]
    step = tl.full([], BLOCK_R, tl.int64)
    grad = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for _ in range(tl.cdiv(share, BLOCK_R)):
        left_mask = (o[:, None] < outer) & (r[None, :] < last)
        right_mask = (r[:, None] < last) & (i[None, :] < inner)
        left = tl.load(left_ptr + left_offsets, mask=left_mask, other=0.0)
        right = tl.load(right_ptr + right_offsets, mask=right_mask, other=0.0)
        grad = tl.dot(left, right, grad, input_precision=PRECISION)
        r += step
        left_offsets += step * stride_lr
        right_offsets += step * stride_rr
    return grad


@triton.jit
def _coefficient_grad_kernel(
    left_ptr,
    right_ptr,
    base_ptr,
    delta_ptrs,
    partials_ptr,
    rows,
    share,
    outer,
    inner,
    stride_lr,
    stride_lo,
    stride_rr,
    stride_ri,
    stride_wo,
    stride_wi,
    COUNT: tl.constexpr,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    inner_tiles = tl.cdiv(inner, BLOCK_I)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    o = (tile // inner_tiles).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tile % inner_tiles).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    first = split.to(tl.int64) * share
    last = tl.minimum(first + share, rows)
    grad = gradient_tile(
        left_ptr,
        right_ptr,
        first,
        last,
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
    offsets = o[:, None] * stride_wo + i[None, :] * stride_wi
    mask = (o[:, None] < outer) & (i[None, :] < inner)
    base = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    if EXPERTS:
        base = tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    partial = (split.to(tl.int64) * tl.num_programs(0) + tile) * COUNT
    for k in range(COUNT):
        delta_ptr = nth_pointer(delta_ptrs, k, COUNT)
        tau = task_vector_tile(base, delta_ptr, offsets, mask, EXPERTS)
        tl.store(partials_ptr + partial + k, tl.sum(grad * tau))


WANTED_PROGRAMS = 256
MIN_SHARE = 512  # rows of a program: fewer, and re-reading the deltas costs more than the product
STAGES = (3, 2, 4)


def tile(
    outer: int, inner: int, dtype: torch.dtype, delta_dtype: torch.dtype, aligned: bool
) -> tuple[int, int, int, int]:
    """(out, inner, rows a step, warps): a rule of shape and dtypes, as it orders the sums.

    What is not `aligned` is read element by element, which takes an address for each.
    """
    if dtype == torch.float32 or not aligned:
        return 64, 64, 32, 8
    if min(outer, inner) <= 64:
        return 64, 64, 64, 4
    # Accumulators, base and task vector share the registers, so fp32 deltas halve the tile.
    return (128, 64, 64, 8) if delta_dtype == torch.float32 else (128, 128, 64, 8)


def row_share(rows: int, tiles: int, step: int) -> int:
    """Rows of one program: all of them once the weight has tiles enough to fill the GPU."""
    share = max(MIN_SHARE, cdiv(rows, cdiv(WANTED_PROGRAMS, tiles)))
    return cdiv(share, step) * step


def needed_shared_memory(config: Config, item_bytes: int) -> int:
    """Upper bound of a block's shared memory: two input tiles a stage, or the tile's exchange."""
    inputs = config.stages * config.inner * (config.out + config.rows) * item_bytes
    return max(inputs, config.out * config.rows * 4)


def configurations(
    outer: int,
    inner: int,
    dtype: torch.dtype,
    delta_dtype: torch.dtype,
    aligned: bool,
    limit: int,
) -> list[Config]:
    """Only the depth of the pipeline is left to measuring; `rows` is the tile's inner width.

    Raises:
        RuntimeError: the device has too little shared memory for the shallowest pipeline.
    """
    block_o, block_i, block_r, warps = tile(outer, inner, dtype, delta_dtype, aligned)
    configs = [Config(block_o, block_i, block_r, warps, stages) for stages in STAGES]
    return fitting(
        "linear_coefficient_grad",
        f"{dtype} needs",
        configs,
        lambda config: needed_shared_memory(config, dtype.itemsize),
        limit,
    )


def linear_coefficient_grad(
    dy: Tensor,
    x: Tensor,
    base: Tensor | None,
    deltas: Sequence[Tensor],
    transpose: bool,
    tf32: bool = False,
) -> Tensor:
    """dlambda_k = <dY^T X, tau_k> for all k; the weight gradient dY^T X is never stored.

    Args:
        dy: [R, O], fp32/fp16/bf16, any strides.
        x: [R, I] in dy's dtype.
        base: [O, I] ([I, O] with `transpose`) if the deltas are experts, else None.
        deltas: K <= 32 tensors [O, I] ([I, O] with `transpose`) of one dtype.
        transpose: whether base and deltas are stored as [I, O].
        tf32: let fp32 products run in tf32.

    Returns:
        [K] fp32.

    Raises:
        RuntimeError: a dtype, device, shape, K or the device's shared memory does not fit.
    """
    op = "linear_coefficient_grad"
    check(op, {"dy": dy, "x": x, "base": base}, deltas)
    left, right = (x, dy) if transpose else (dy, x)
    rows, outer, inner = dy.shape[0], left.shape[1], right.shape[1]
    check_shape(op, "x", x, [rows, x.shape[1]])
    check_shape(op, "base", base, [outer, inner])
    check_deltas(op, deltas, [outer, inner])
    if x.dtype != dy.dtype:
        raise RuntimeError(f"{op}: x is {x.dtype}, expected {dy.dtype} as dy")
    if 0 in (rows, outer, inner):
        return torch.zeros(len(deltas), dtype=torch.float32, device=dy.device)
    left, right = by_rows(left), by_rows(right)
    origin, deltas = like_layout(deltas[0] if base is None else base, deltas)
    aligned = is_aligned(left, right, origin, *deltas)
    limit = device_limits(dy.device)[1]
    configs = configurations(outer, inner, dy.dtype, deltas[0].dtype, aligned, limit)
    tiles = cdiv(outer, configs[0].out) * cdiv(inner, configs[0].rows)
    share = row_share(rows, tiles, configs[0].inner)
    grid = tiles, cdiv(rows, share)
    partials = torch.empty(tiles * grid[1], len(deltas), dtype=torch.float32, device=dy.device)

    def launch(config: Config) -> None:
        _coefficient_grad_kernel[grid](
            left,
            right,
            origin,
            deltas,
            partials,
            rows,
            share,
            outer,
            inner,
            *left.stride(),
            *right.stride(),
            *origin.stride(),
            COUNT=len(deltas),
            EXPERTS=base is not None,
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_O=config.out,
            BLOCK_I=config.rows,
            BLOCK_R=config.inner,
            **config.launch,
        )

    key = (op, dy.dtype, origin.dtype, deltas[0].dtype, len(deltas), base is None, tf32)
    run(dy, (*key, power_of_two(rows), outer, inner), configs, launch)
    return sum_partials(partials)
