"""`masked_weighted_sum`: W = base + sum_k lambda_k tau_k where tau_k = mask_k * unified."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native.memory import fresh
from ..backends import native_kernels
from ._bits import mask_rows, packed_shape, unpack_rows
from ._library import (
    accumulate_dtype,
    check,
    check_coefficients,
    check_float,
    refuse_forward_mode,
    refuse_gradient,
    register,
    register_gradient,
    register_no_gradient,
)


def masked_weighted_sum(
    base: Tensor,
    unified: Tensor,
    masks: Tensor,
    coefficients: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add K scaled task vectors, which are masks of one unified vector, to a base tensor.

    out = base + sum_k lambda_k mask_k unified, in the order of k in fp32, rounded once. Entries
    of no mask keep the base's bytes, and a task with coefficient 0 contributes nothing.

    Args:
        base: [*], fp32/fp16/bf16/fp64.
        unified: [*].
        masks: uint8 [K, rows, bytes] as from `elect`.
        coefficients: [K], differentiable.
        dtype: dtype of the result, by default base's.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.

    Source: EMR-Merging (arXiv 2405.17461), eq. 4; TALL masks (arXiv 2405.07813).
    """
    refuse_forward_mode("masked_weighted_sum", coefficients)
    return torch.ops.fastmerge.masked_weighted_sum(base, unified, masks, coefficients, dtype)


def masked_coefficient_grad(grad_weight: Tensor, unified: Tensor, masks: Tensor) -> Tensor:
    """Gradient with respect to the coefficients of masked task vectors.

    dlambda_k = <grad_weight, mask_k unified>, all K in one read.

    Args:
        grad_weight: [*], gradient of a loss with respect to the merged weight.
        unified: [*].
        masks: uint8 [K, rows, bytes] as from `elect`.

    Returns:
        [K], fp32 (fp64 if an argument is fp64).

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.
    """
    return torch.ops.fastmerge.masked_coefficient_grad(grad_weight, unified, masks)


def check_masked(op: str, like: Tensor, unified: Tensor, masks: Tensor, name: str = "base") -> None:
    """A unified vector like the tensor `like`, and the packed masks of K tasks.

    Raises:
        RuntimeError: names the argument.
    """
    check_float(op, name, like)
    check_float(op, "unified", unified)
    check(
        unified.shape == like.shape and unified.device == like.device,
        lambda: (
            f"{op}: unified is {list(unified.shape)} on {unified.device}, "
            f"expected {list(like.shape)} on {like.device} as {name}"
        ),
    )
    rows, columns = packed_shape(like.shape)
    check(
        masks.dtype == torch.uint8
        and masks.dim() == 3
        and masks.shape[0] > 0
        and tuple(masks.shape[1:]) == (rows, columns)
        and masks.device == like.device,
        lambda: (
            f"{op}: masks is {masks.dtype} {list(masks.shape)} on {masks.device}, "
            f"expected torch.uint8 [K, {rows}, {columns}] on {like.device}, K >= 1"
        ),
    )


def task_vectors(unified: Tensor, masks: Tensor, dtype: torch.dtype):
    """The tau_k [*] one after the other, in `dtype`."""
    for row in masks.split(1):
        yield torch.where(unpack_rows(row, unified.shape)[0], unified.to(dtype), 0)


def native_masks(masks: Tensor) -> Tensor:
    """The masks with each task's bytes in one piece, as the kernels read them."""
    return masks if masks[0].is_contiguous() else masks.contiguous()


def _check(base, unified, masks, coefficients):
    check_masked("masked_weighted_sum", base, unified, masks)
    check_coefficients("masked_weighted_sum", coefficients, masks.shape[0], base.device)


def _reference(base, unified, masks, coefficients, dtype):
    _check(base, unified, masks, coefficients)
    accumulate = accumulate_dtype(base, unified, coefficients)
    total, wide = base.to(accumulate), unified.to(accumulate)
    for row, coefficient in zip(masks.split(1), coefficients.to(accumulate).unbind(), strict=True):
        chosen = unpack_rows(row, unified.shape)[0] & (coefficient != 0)
        total = torch.where(chosen, total + coefficient * wide, total)
    return total.to(dtype or base.dtype, copy=True)


def _compiled(base, unified, masks, coefficients, dtype):
    _check(base, unified, masks, coefficients)
    out = fresh(base, dtype or base.dtype)
    kernels = native_kernels("masked_combine", base, unified, coefficients, out)
    if kernels is None:
        return _reference(base, unified, masks, coefficients, dtype)
    kernels.masked_combine(
        unified.contiguous(),
        native_masks(masks).unbind(),
        mask_rows(base.shape),
        base=base.contiguous(),
        coefficients=coefficients.float().contiguous(),
        out=out,
    )
    return out


def _fake(base, unified, masks, coefficients, dtype):
    _check(base, unified, masks, coefficients)
    return base.new_empty(base.shape, dtype=dtype or base.dtype)


def _setup_context(ctx, inputs, output):
    base, unified, masks, coefficients, _ = inputs
    refuse_gradient("masked_weighted_sum", "base", base)
    refuse_gradient("masked_weighted_sum", "unified", unified)
    ctx.save_for_backward(unified, masks)
    ctx.coefficient_dtype = coefficients.dtype


def _backward(ctx, grad):
    dots = torch.ops.fastmerge.masked_coefficient_grad(grad, *ctx.saved_tensors)
    return None, None, None, dots.to(ctx.coefficient_dtype), None


register(
    "masked_weighted_sum(Tensor base, Tensor unified, Tensor masks, Tensor coefficients, "
    "ScalarType? dtype) -> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_gradient("masked_weighted_sum", _backward, _setup_context)


def _grad_check(grad, unified, masks):
    check_masked("masked_coefficient_grad", grad, unified, masks, "grad_weight")


def _grad_reference(grad, unified, masks):
    _grad_check(grad, unified, masks)
    accumulate = accumulate_dtype(grad, unified)
    g = grad.to(accumulate)
    taus = task_vectors(unified, masks, accumulate)
    return torch.stack([(g * tau).sum() for tau in taus])


def _grad_compiled(grad, unified, masks):
    _grad_check(grad, unified, masks)
    kernels = native_kernels("masked_combine", grad, unified)
    if kernels is None:
        return _grad_reference(grad, unified, masks)
    dots = kernels.masked_combine(
        unified.contiguous(),
        native_masks(masks).unbind(),
        mask_rows(grad.shape),
        grad=grad.contiguous(),
    )
    return dots.float()


def _grad_fake(grad, unified, masks):
    _grad_check(grad, unified, masks)
    return grad.new_empty(masks.shape[0], dtype=accumulate_dtype(grad, unified))


register(
    "masked_coefficient_grad(Tensor grad_weight, Tensor unified, Tensor masks) -> Tensor",
    reference=_grad_reference,
    compiled=_grad_compiled,
    fake=_grad_fake,
)
register_no_gradient("masked_coefficient_grad")
