"""`residual_adapter`: y = x - up relu(down x), with adapters of its own for every task of a batch.

On a CPU, two products of torch's for every run of rows of one task; where few rows belong to a
sample, rows are grouped by task first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import forced_backend, triton_kernels
from ._groups import group_rows
from ._library import (
    accumulate_dtype,
    as_rows,
    check,
    check_float,
    refuse_forward_mode,
    register,
    register_gradient,
    register_no_gradient,
)
from ._triton_linear import allow_tf32

# Rows of a sample from which two products for each sample cost less than moving rows into groups.
LEAST_ROWS = 16
TRITON_RANK = 64  # what the kernel's registers hold


def residual_adapter(x: Tensor, down: Tensor, up: Tensor, tasks: Tensor) -> Tensor:
    """Subtract from activations what their task's low-rank adapter makes of them.

    y_r = x_r - up_t relu(down_t x_r), t the task of row r; gradients reach x, down and up.

    Args:
        x: [..., d] activations, R rows.
        down: [K, rank, d], one adapter a task.
        up: [K, d, rank].
        tasks: int64 [] for all rows, or [S] where S divides R: id s is that of rows s R/S to
            (s + 1) R/S, so one id a sample for [B, tokens, d] and for [B * tokens, d].

    Returns:
        [..., d] in x's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
        IndexError: a task is not in 0..K-1; on a GPU, where finding out would make the host wait,
            such rows become NaN in the Triton kernel.

    Source: Representation Surgery (arXiv 2402.02705).
    """
    refuse_forward_mode("residual_adapter", x, down, up)
    return torch.ops.fastmerge.residual_adapter(x, down, up, tasks)


def _check(op, x, down, up, tasks):
    for name, tensor in (("x", x), ("down", down), ("up", up)):
        check_float(op, name, tensor)
    check(
        down.dim() == 3 and down.shape[0] > 0,
        lambda: f"{op}: down has shape {list(down.shape)}, expected [K >= 1, rank, d]",
    )
    count, rank, width = down.shape
    check(
        x.dim() >= 1 and x.shape[-1] == width and x.device == down.device,
        lambda: (
            f"{op}: x is {list(x.shape)} on {x.device}, expected [..., {width}] on {down.device}"
        ),
    )
    check(
        list(up.shape) == [count, width, rank] and up.device == down.device,
        lambda: (
            f"{op}: up is {list(up.shape)} on {up.device}, "
            f"expected {[count, width, rank]} on {down.device}"
        ),
    )
    check(
        tasks.dtype == torch.int64 and tasks.dim() <= 1 and tasks.device == down.device,
        lambda: (
            f"{op}: tasks is {tasks.dtype} {list(tasks.shape)} on {tasks.device}, "
            f"expected torch.int64 [] or [S] on {down.device}"
        ),
    )
    rows, samples = x.shape[:-1].numel(), tasks.numel()
    check(
        rows == 0 if samples == 0 else rows % samples == 0,
        lambda: f"{op}: {samples} tasks for {rows} rows, expected a number that divides the rows",
    )


def _by_samples(x: Tensor, tasks: Tensor) -> Tensor:
    """x as [S, R/S, d]."""
    samples, rows = tasks.numel(), x.shape[:-1].numel()
    return x.reshape(samples, rows // max(1, samples), x.shape[-1])


def _reference(x, down, up, tasks):
    _check("residual_adapter", x, down, up, tasks)
    accumulate = accumulate_dtype(x, down, up)
    samples, ids = _by_samples(x, tasks).to(accumulate), tasks.reshape(-1)
    down, up = (t.index_select(0, ids).to(accumulate) for t in (down, up))
    y = samples - (samples @ down.mT).relu() @ up.mT
    return y.to(x.dtype).view(x.shape)


def _compiled(x, down, up, tasks):
    _check("residual_adapter", x, down, up, tasks)
    kernels = triton_kernels("residual_adapter_forward", {"x": x, "down": down, "up": up})
    if kernels is not None and down.shape[1] <= TRITON_RANK:
        samples = _by_samples(x, tasks)
        y = kernels.residual_adapter_forward(samples, down, up, tasks.reshape(-1), allow_tf32())
        return y.view(x.shape)
    if x.is_cuda or forced_backend() == "reference":
        return _reference(x, down, up, tasks)
    rows = as_rows(x)
    down, up = (t.to(x.dtype) for t in (down, up))
    order, spans = _spans(tasks, len(rows), len(down))
    rows = rows if order is None else rows.index_select(0, order)
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for task, start, stop in spans:
        thin = (rows[start:stop] @ down[task].t()).relu_()
        torch.addmm(rows[start:stop], thin, up[task].t(), alpha=-1, out=y[start:stop])
    if order is not None:
        y = torch.empty_like(y).index_copy_(0, order, y)
    return y.view(x.shape)


def _spans(tasks: Tensor, rows: int, count: int) -> tuple[Tensor | None, list]:
    """The order in which to take rows, None for their own, and (task, start, stop) of each run.

    Raises:
        IndexError: a task is not in 0..count-1.
    """
    ids = tasks.reshape(-1)
    if rows == 0:
        return None, []
    if int(ids.min()) < 0 or int(ids.max()) >= count:
        raise IndexError(
            f"residual_adapter: tasks {ids.unique().tolist()}, expected 0..{count - 1}"
        )
    each = rows // len(ids)
    if each >= LEAST_ROWS or len(ids) == 1:
        joined, sizes = torch.unique_consecutive(ids, return_counts=True)
        return None, list(_runs(joined.tolist(), (sizes * each).tolist()))
    groups = group_rows(F.one_hot(ids, count).float().unsqueeze(1), (len(ids), each))
    return groups.order, list(_runs(groups.coefficients.argmax(-1).tolist(), groups.sizes))


def _runs(tasks: list[int], sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for task, size in zip(tasks, sizes, strict=True):
        yield task, start, start + size
        start += size


def _fake(x, down, up, tasks):
    _check("residual_adapter", x, down, up, tasks)
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, down, up, tasks = ctx.saved_tensors
    need_x, need_down, need_up = (ctx.needs_input_grad[i + 1] for i in range(3))
    dx, ddown, dup = torch.ops.fastmerge.residual_adapter_backward(
        grad, x, down, up, tasks, need_x, need_down or need_up
    )
    return (
        dx if need_x else None,
        ddown.to(down.dtype) if need_down else None,
        dup.to(up.dtype) if need_up else None,
        None,
    )


register(
    "residual_adapter(Tensor x, Tensor down, Tensor up, Tensor tasks) -> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_gradient("residual_adapter", _backward, _setup_context)


def _backward_check(grad, x, down, up, tasks):
    op = "residual_adapter_backward"
    _check(op, x, down, up, tasks)
    check(
        grad.shape == x.shape and grad.device == x.device,
        lambda: (
            f"{op}: grad is {list(grad.shape)} on {grad.device}, "
            f"expected {list(x.shape)} on {x.device}"
        ),
    )


def _unfilled(x, down, up, need_x, need_adapters, accumulate):
    """The results, unfilled or for sums zero; empty tensors for what is not needed."""
    return (
        x.new_empty(x.shape if need_x else 0),
        down.new_zeros(down.shape if need_adapters else 0, dtype=accumulate),
        up.new_zeros(up.shape if need_adapters else 0, dtype=accumulate),
    )


def _backward_reference(grad, x, down, up, tasks, need_x, need_adapters):
    """With h = relu(down x) and dh = -(up^T dy) [h > 0]: dx = dy + down^T dh, ddown = sum dh x^T,
    dup = -sum dy h^T, sums over the rows of each task."""
    _backward_check(grad, x, down, up, tasks)
    accumulate = accumulate_dtype(x, down, up)
    dx, ddown, dup = _unfilled(x, down, up, need_x, need_adapters, accumulate)
    ids = tasks.reshape(-1)
    dy, rows = (_by_samples(t, tasks).to(accumulate) for t in (grad, x))
    own_down, own_up = (t.index_select(0, ids).to(accumulate) for t in (down, up))
    thin = (rows @ own_down.mT).relu()
    dthin = -(dy @ own_up).where(thin != 0, 0)
    if need_x:
        dx = (dy + dthin @ own_down).to(x.dtype).view(x.shape)
    if need_adapters:  # a product instead of index_add, which adds in any order on a GPU
        of_task = F.one_hot(ids, len(down)).to(accumulate).t()
        ddown = torch.einsum("ks,srd->krd", of_task, dthin.mT @ rows)
        dup = -torch.einsum("ks,sdr->kdr", of_task, dy.mT @ thin)
    return dx, ddown, dup


def _backward_compiled(grad, x, down, up, tasks, need_x, need_adapters):
    if x.is_cuda or forced_backend() == "reference":
        return _backward_reference(grad, x, down, up, tasks, need_x, need_adapters)
    _backward_check(grad, x, down, up, tasks)
    accumulate = accumulate_dtype(x, down, up)
    dx, ddown, dup = _unfilled(x, down, up, need_x, need_adapters, accumulate)
    dy, rows = as_rows(grad.to(x.dtype)), as_rows(x)
    down, up = (t.to(x.dtype) for t in (down, up))
    order, spans = _spans(tasks, len(rows), len(down))
    if order is not None:
        dy, rows = dy.index_select(0, order), rows.index_select(0, order)
    moved = torch.empty_like(rows, memory_format=torch.contiguous_format) if need_x else dx
    for task, start, stop in spans:
        thin = (rows[start:stop] @ down[task].t()).relu_()
        dthin = (dy[start:stop] @ up[task]).masked_fill_(thin == 0, 0)
        if need_x:
            torch.addmm(dy[start:stop], dthin, down[task], alpha=-1, out=moved[start:stop])
        if need_adapters:
            ddown[task] -= dthin.t() @ rows[start:stop]
            dup[task] -= dy[start:stop].t() @ thin
    if need_x:
        moved = moved if order is None else torch.empty_like(moved).index_copy_(0, order, moved)
        dx = moved.view(x.shape)
    return dx, ddown, dup


def _backward_fake(grad, x, down, up, tasks, need_x, need_adapters):
    _backward_check(grad, x, down, up, tasks)
    return _unfilled(x, down, up, need_x, need_adapters, accumulate_dtype(x, down, up))


register(
    "residual_adapter_backward(Tensor grad, Tensor x, Tensor down, Tensor up, Tensor tasks, "
    "bool need_x, bool need_adapters) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    compiled=_backward_compiled,
    fake=_backward_fake,
)
register_no_gradient("residual_adapter_backward")
