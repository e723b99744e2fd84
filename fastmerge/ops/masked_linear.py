"""`masked_linear`: y = x W^T + b with W = base + sum_k lambda_k mask_k unified, not built whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._groups import check_row_coefficients
from ._library import (
    accumulate_dtype,
    as_rows,
    check,
    check_float,
    refuse_forward_mode,
    refuse_gradient,
    register,
    register_gradient,
    register_no_gradient,
)
from .masked_weighted_sum import check_masked, task_vectors


def masked_linear(
    x: Tensor,
    base: Tensor,
    unified: Tensor,
    masks: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    transpose: bool = False,
) -> Tensor:
    """Linear layer whose weight is a base and masked parts of one unified task vector.

    y = x (base + sum_k lambda_k mask_k unified)^T + bias; gradients reach x, coefficients and
    bias. Row coefficients with one entry that is not 0 select one task for each sample.

    Args:
        x: [..., I] activations.
        base: [O, I]; [I, O] with `transpose`.
        unified: like base.
        masks: uint8 [K, rows, bytes] of base's shape, as from `elect`.
        coefficients: [K], or row coefficients [..., K] that broadcast to x's leading dimensions;
            [B, 1, K] for x [B, T, I] are coefficients per sample.
        bias: [O].
        transpose: whether base, unified and masks are stored as [I, O].

    Returns:
        [..., O] in x's dtype. Merged weights are rounded once to x's dtype before the GEMM.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match, or base or unified requires grad.

    Source: EMR-Merging (arXiv 2405.17461) builds one weight for each task instead.
    """
    refuse_forward_mode("masked_linear", x, coefficients)
    return torch.ops.fastmerge.masked_linear(x, base, unified, masks, coefficients, bias, transpose)


def _check(x, base, unified, masks, coefficients, bias, transpose):
    op = "masked_linear"
    check_masked(op, base, unified, masks)
    check_float(op, "x", x)
    check(base.dim() == 2, lambda: f"{op}: base has shape {list(base.shape)}, expected 2-D")
    inner, outer = (0, 1) if transpose else (1, 0)
    check(
        x.dim() >= 1 and x.shape[-1] == base.shape[inner] and x.device == base.device,
        lambda: (
            f"{op}: x is {list(x.shape)} on {x.device}, "
            f"expected [..., {base.shape[inner]}] on {base.device}"
        ),
    )
    check_row_coefficients(op, coefficients, x.shape[:-1], masks.shape[0], base.device)
    if bias is not None:
        check(
            list(bias.shape) == [base.shape[outer]] and bias.device == base.device,
            lambda: (
                f"{op}: bias is {list(bias.shape)} on {bias.device}, "
                f"expected [{base.shape[outer]}] on {base.device}"
            ),
        )


def _merged(base, unified, masks, coefficients, dtype):
    return torch.ops.fastmerge.masked_weighted_sum(
        base, unified, masks, coefficients.detach(), dtype
    )


def _oriented(weight: Tensor, transpose: bool) -> Tensor:
    """A weight as [O, I]."""
    return weight.t() if transpose else weight


def _reference(x, base, unified, masks, coefficients, bias, transpose):
    _check(x, base, unified, masks, coefficients, bias, transpose)
    if coefficients.dim() == 1:
        weight = _merged(base, unified, masks, coefficients, x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, _oriented(weight, transpose), bias)
    accumulate = accumulate_dtype(x, base, unified, coefficients)
    rows, lam = x.to(accumulate), coefficients.to(accumulate)
    y = rows @ _oriented(base.to(accumulate), transpose).t()  # [..., O]
    for k, tau in enumerate(task_vectors(unified, masks, accumulate)):
        y += lam[..., k : k + 1] * (rows @ _oriented(tau, transpose).t())
    if bias is not None:
        y += bias.to(accumulate)
    return y.to(x.dtype)


def _fake(x, base, unified, masks, coefficients, bias, transpose):
    _check(x, base, unified, masks, coefficients, bias, transpose)
    return x.new_empty((*x.shape[:-1], base.shape[1 if transpose else 0]))


def _setup_context(ctx, inputs, output):
    x, base, unified, masks, coefficients, bias, ctx.transpose = inputs
    refuse_gradient("masked_linear", "base", base)
    refuse_gradient("masked_linear", "unified", unified)
    ctx.save_for_backward(x, base, unified, masks, coefficients)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    x, base, unified, masks, coefficients = ctx.saved_tensors
    need_x, need_lam, need_bias = (ctx.needs_input_grad[i + 1] for i in (0, 4, 5))
    grad_x = grad_lam = grad_bias = None
    if need_x or need_lam:
        grad_x, grad_lam = torch.ops.fastmerge.masked_linear_backward(
            grad, x, base, unified, masks, coefficients, ctx.transpose, need_x, need_lam
        )
        grad_x = grad_x if need_x else None
        grad_lam = grad_lam.to(coefficients.dtype) if need_lam else None
    if need_bias:
        grad_bias = as_rows(grad).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_lam, grad_bias, None


register(
    "masked_linear(Tensor x, Tensor base, Tensor unified, Tensor masks, Tensor coefficients, "
    "Tensor? bias, bool transpose) -> Tensor",
    reference=_reference,
    fake=_fake,
)
register_gradient("masked_linear", _backward, _setup_context)


def _backward_check(grad, x, base, unified, masks, coefficients, transpose):
    _check(x, base, unified, masks, coefficients, None, transpose)
    expected = [*x.shape[:-1], base.shape[1 if transpose else 0]]
    check(
        list(grad.shape) == expected and grad.device == x.device,
        lambda: (
            f"masked_linear_backward: grad is {list(grad.shape)} on {grad.device}, "
            f"expected {expected} on {x.device}"
        ),
    )


def _backward_reference(
    grad, x, base, unified, masks, coefficients, transpose, need_x, need_coefficients
):
    """dX = dY W and dlambda_k = <dY^T X, tau_k>; per row, then summed to the coefficients' shape,
    for row coefficients."""
    _backward_check(grad, x, base, unified, masks, coefficients, transpose)
    accumulate = accumulate_dtype(x, base, unified, coefficients)
    grad_x, grad_lam = x.new_empty(0), x.new_empty(0, dtype=accumulate)
    if coefficients.dim() == 1:
        dy, rows = as_rows(grad), as_rows(x)
        if need_x:
            weight = _merged(base, unified, masks, coefficients, x.dtype)
            grad_x = (dy @ _oriented(weight, transpose)).view_as(x)
        if need_coefficients:
            grad_weight = rows.t() @ dy if transpose else dy.t() @ rows
            grad_lam = torch.ops.fastmerge.masked_coefficient_grad(grad_weight, unified, masks)
        return grad_x, grad_lam.to(accumulate)
    dy, rows, lam = (t.to(accumulate) for t in (grad, x, coefficients))
    total = dy @ _oriented(base.to(accumulate), transpose)
    dots = []
    for k, tau in enumerate(task_vectors(unified, masks, accumulate)):
        product = dy @ _oriented(tau, transpose)  # [..., I]
        total += lam[..., k : k + 1] * product
        dots.append((rows * product).sum(-1))
    if need_x:
        grad_x = total.to(x.dtype)
    if need_coefficients:
        grad_lam = torch.stack(dots, -1).sum_to_size(coefficients.shape)
    return grad_x, grad_lam


def _backward_fake(
    grad, x, base, unified, masks, coefficients, transpose, need_x, need_coefficients
):
    _backward_check(grad, x, base, unified, masks, coefficients, transpose)
    accumulate = accumulate_dtype(x, base, unified, coefficients)
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(coefficients.shape if need_coefficients else 0, dtype=accumulate),
    )


register(
    "masked_linear_backward(Tensor grad, Tensor x, Tensor base, Tensor unified, Tensor masks, "
    "Tensor coefficients, bool transpose, bool need_x, bool need_coefficients) "
    "-> (Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)
register_no_gradient("masked_linear_backward")
