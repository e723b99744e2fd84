"""`coefficient_grad`: the K inner products of one weight gradient with K task vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native_kernels
from ._library import (
    accumulate_dtype,
    as_task_vector,
    check,
    check_deltas,
    own_operation,
    register,
    register_no_gradient,
    unpack_deltas,
)


def coefficient_grad(grad_weight: Tensor, deltas: object, base: Tensor | None = None) -> Tensor:
    """Gradient of a loss with respect to K merge coefficients, from the merged weight's gradient.

    dlambda_k = <grad_weight, tau_k>, all K in one read.

    Args:
        grad_weight: [*], gradient of the loss with respect to the merged weight.
        deltas: K tensors [*] of one dtype (task vectors), or a delta format.
        base: [*], needed by the format `Experts`, where tau_k = expert_k - base.

    Returns:
        [K], fp32 (fp64 if an argument is fp64).

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.
        ValueError: experts without their base.

    Source: chain rule on W = base + sum_k lambda_k tau_k; AdaMerging (arXiv 2310.02575).
    """
    own = own_operation(deltas, "coefficient_grad")
    if own is not None:
        return own(grad_weight, base)
    tensors, experts = unpack_deltas(deltas)
    if experts and base is None:
        raise ValueError("coefficient_grad: deltas of format Experts need base")
    return torch.ops.fastmerge.coefficient_grad(grad_weight, tensors, base if experts else None)


def _check(grad, deltas, base):
    check_deltas("coefficient_grad", grad, deltas, base_name="grad_weight")
    if base is not None:
        check(
            base.shape == grad.shape and base.device == grad.device,
            lambda: (
                f"coefficient_grad: base is {list(base.shape)} on {base.device}, "
                f"expected {list(grad.shape)} on {grad.device} as grad_weight"
            ),
        )


def _reference(grad, deltas, base):
    _check(grad, deltas, base)
    accumulate = accumulate_dtype(grad, deltas[0], base)
    g = grad.to(accumulate)
    return torch.stack(
        [(g * as_task_vector(base, d, base is not None, accumulate)).sum() for d in deltas]
    )


def _compiled(grad, deltas, base):
    kernels = native_kernels("coefficient_grad", grad, *deltas[:1], base)
    if kernels is None:
        return _reference(grad, deltas, base)
    _check(grad, deltas, base)
    dots = kernels.coefficient_grad(
        [grad.contiguous()],
        None if base is None else [base.contiguous()],
        [[d.contiguous() for d in deltas]],
    )
    return dots[0].float()


def _fake(grad, deltas, base):
    _check(grad, deltas, base)
    return grad.new_empty(len(deltas), dtype=accumulate_dtype(grad, deltas[0], base))


register(
    "coefficient_grad(Tensor grad_weight, Tensor[] deltas, Tensor? base) -> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_no_gradient("coefficient_grad")
