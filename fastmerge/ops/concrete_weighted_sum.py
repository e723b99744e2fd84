"""`concrete_weighted_sum`: base + sum_k lambda_k m tau_k with a relaxed mask m, never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native.memory import fresh
from ..backends import native_kernels
from ._library import (
    accumulate_dtype,
    as_task_vector,
    check,
    check_coefficients,
    check_deltas,
    check_float,
    refuse_forward_mode,
    refuse_gradient,
    register,
    register_gradient,
    register_no_gradient,
    unpack_deltas,
)
from ._relaxed_mask import MASK, check_mask, mask_and_slope


def concrete_weighted_sum(
    base: Tensor,
    deltas: object,
    logits: Tensor,
    coefficients: Tensor,
    *,
    key: int | None = None,
    temperature: float = 0.5,
    offset: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add K scaled task vectors, all multiplied by one relaxed mask, to a base tensor.

    out = base + sum_k (lambda_k m) tau_k in the order of k in fp32, rounded once, m as for
    `concrete_mean`. Noise and mask are made where they are used and again in the backward pass:
    the op reads base, deltas and 4 bytes an entry of logits, and writes the result. The bytes of
    `weighted_sum` where m = 1, those of base where m = 0.

    Args:
        base: [*], fp32/fp16/bf16/fp64.
        deltas: K tensors [*] of one dtype (task vectors), or `Experts` or `Dense`.
        logits: [*] fp32 (fp64 for the reference), differentiable.
        coefficients: [K], differentiable; divided by the mask's mean where that is wanted.
        key, temperature, offset: of the mask, as for `concrete_mean`.
        dtype: dtype of the result, by default base's.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.

    Source: Concrete subspace learning (arXiv 2312.06173).
    """
    refuse_forward_mode("concrete_weighted_sum", logits, coefficients)
    tensors, experts = unpack_deltas(deltas)
    return torch.ops.fastmerge.concrete_weighted_sum(
        base, tensors, logits, key, temperature, offset, coefficients, experts, dtype
    )


def concrete_grad(
    grad_weight: Tensor,
    base: Tensor,
    deltas: object,
    logits: Tensor,
    coefficients: Tensor,
    *,
    key: int | None = None,
    temperature: float = 0.5,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gradients of a loss with respect to a relaxed mask's logits and to the coefficients.

    dlogits = G (sum_k lambda_k tau_k) dm/dlogits and dlambda_k = <G, m tau_k>, in one read.

    Args:
        grad_weight: [*], gradient G of the loss with respect to the merged weight.
        base, deltas, logits, coefficients, key, temperature, offset: as for
            `concrete_weighted_sum`.

    Returns:
        [*] like logits, and [K] in fp32 (fp64 if an argument is fp64).

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.
    """
    tensors, experts = unpack_deltas(deltas)
    return torch.ops.fastmerge.concrete_grad(
        grad_weight, base, tensors, logits, key, temperature, offset, coefficients, experts
    )


def check_concrete(op, base, deltas, logits, temperature, offset, coefficients) -> None:
    """The arguments that all ops on masked task vectors share."""
    check_deltas(op, base, deltas)
    check_mask(op, logits, temperature, offset, base)
    check_coefficients(op, coefficients, len(deltas), base.device)


def native(op: str, base: Tensor, deltas: list[Tensor], logits: Tensor, *others: Tensor):
    """The compiled kernels that can run an op on these tensors, or None."""
    if logits.dtype != torch.float32:
        return None
    return native_kernels("concrete_combine", base, *deltas[:1], *others)


def _reference(base, deltas, logits, key, temperature, offset, coefficients, experts, dtype):
    op = "concrete_weighted_sum"
    check_concrete(op, base, deltas, logits, temperature, offset, coefficients)
    accumulate = accumulate_dtype(base, deltas[0], logits, coefficients)
    mask, _ = mask_and_slope(logits, key, temperature, offset, accumulate)
    total = base.to(accumulate, copy=True, memory_format=torch.contiguous_format)
    for coefficient, delta in zip(coefficients.to(accumulate).unbind(), deltas, strict=True):
        total += coefficient * mask * as_task_vector(base, delta, experts, accumulate)
    return total.to(dtype or base.dtype)


def _compiled(base, deltas, logits, key, temperature, offset, coefficients, experts, dtype):
    op = "concrete_weighted_sum"
    check_concrete(op, base, deltas, logits, temperature, offset, coefficients)
    out = fresh(base, dtype or base.dtype)
    kernels = native(op, base, deltas, logits, coefficients, out)
    if kernels is None:
        return _reference(
            base, deltas, logits, key, temperature, offset, coefficients, experts, dtype
        )
    kernels.concrete_combine(
        base.contiguous(),
        [d.contiguous() for d in deltas],
        logits.contiguous(),
        coefficients.float().contiguous(),
        key,
        temperature,
        offset,
        experts=experts,
        out=out,
    )
    return out


def _fake(base, deltas, logits, key, temperature, offset, coefficients, experts, dtype):
    op = "concrete_weighted_sum"
    check_concrete(op, base, deltas, logits, temperature, offset, coefficients)
    return base.new_empty(base.shape, dtype=dtype or base.dtype)


def _setup_context(ctx, inputs, output):
    base, deltas, logits, *ctx.mask, coefficients, ctx.experts, _ = inputs
    refuse_gradient("concrete_weighted_sum", "base", base)
    refuse_gradient("concrete_weighted_sum", "deltas", deltas)
    ctx.save_for_backward(base, logits, coefficients, *deltas)


def _backward(ctx, grad):
    base, logits, coefficients, *deltas = ctx.saved_tensors
    grad_logits, dots = torch.ops.fastmerge.concrete_grad(
        grad, base, deltas, logits, *ctx.mask, coefficients, ctx.experts
    )
    dots = dots.to(coefficients.dtype)
    return None, None, grad_logits, None, None, None, dots, None, None


register(
    f"concrete_weighted_sum(Tensor base, Tensor[] deltas, {MASK}, Tensor coefficients, "
    "bool experts, ScalarType? dtype) -> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_gradient("concrete_weighted_sum", _backward, _setup_context)


def _grad_check(grad, base, deltas, logits, temperature, offset, coefficients):
    op = "concrete_grad"
    check_concrete(op, base, deltas, logits, temperature, offset, coefficients)
    check_float(op, "grad_weight", grad)
    check(
        grad.shape == base.shape and grad.device == base.device,
        lambda: (
            f"{op}: grad_weight is {list(grad.shape)} on {grad.device}, "
            f"expected {list(base.shape)} on {base.device} as base"
        ),
    )


def _grad_reference(grad, base, deltas, logits, key, temperature, offset, coefficients, experts):
    _grad_check(grad, base, deltas, logits, temperature, offset, coefficients)
    accumulate = accumulate_dtype(grad, base, deltas[0], logits, coefficients)
    mask, slope = mask_and_slope(logits, key, temperature, offset, accumulate)
    g, total, dots = grad.to(accumulate), torch.zeros_like(mask), []
    for coefficient, delta in zip(coefficients.to(accumulate).unbind(), deltas, strict=True):
        tau = as_task_vector(base, delta, experts, accumulate)
        total += coefficient * tau
        dots.append((g * mask * tau).sum())
    return (g * total * slope).to(logits.dtype), torch.stack(dots)


def _grad_compiled(grad, base, deltas, logits, key, temperature, offset, coefficients, experts):
    _grad_check(grad, base, deltas, logits, temperature, offset, coefficients)
    kernels = native("concrete_grad", base, deltas, logits, coefficients, grad)
    if kernels is None:
        return _grad_reference(
            grad, base, deltas, logits, key, temperature, offset, coefficients, experts
        )
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    dots = kernels.concrete_combine(
        base.contiguous(),
        [d.contiguous() for d in deltas],
        logits.contiguous(),
        coefficients.float().contiguous(),
        key,
        temperature,
        offset,
        experts=experts,
        grad=grad.contiguous(),
        grad_logits=out,
    )
    return out, dots.float()


def _grad_fake(grad, base, deltas, logits, key, temperature, offset, coefficients, experts):
    _grad_check(grad, base, deltas, logits, temperature, offset, coefficients)
    accumulate = accumulate_dtype(grad, base, deltas[0], logits, coefficients)
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        base.new_empty(len(deltas), dtype=accumulate),
    )


register(
    f"concrete_grad(Tensor grad_weight, Tensor base, Tensor[] deltas, {MASK}, "
    "Tensor coefficients, bool experts) -> (Tensor, Tensor)",
    reference=_grad_reference,
    compiled=_grad_compiled,
    fake=_grad_fake,
)
register_no_gradient("concrete_grad")
