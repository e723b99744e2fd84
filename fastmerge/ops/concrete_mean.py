"""`concrete_mean`: the mean of a relaxed mask that is never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native_kernels
from ._library import (
    accumulate_dtype,
    check,
    refuse_forward_mode,
    register,
    register_gradient,
    register_no_gradient,
)
from ._relaxed_mask import MASK, check_mask, mask_and_slope


def concrete_mean(
    logits: Tensor, *, key: int | None = None, temperature: float = 0.5, offset: int = 0
) -> Tensor:
    """Mean of a relaxed mask, which Concrete subspace learning divides the mask by.

    mu = mean_i m_i, m = sigmoid((logits + log u - log(1 - u)) / temperature) with u of a
    counter-based generator, which depends on key and an entry's index only; d mu / d logits_i =
    m_i (1 - m_i) / (temperature D). Reads the D logits once, in either direction.

    Args:
        logits: [*], differentiable; fp32, or fp64 for the reference.
        key: 64 bits, for example of `random_key`; None for u = 1/2, the mask without noise.
        temperature: of the relaxation; 0 for m of zeros and ones.
        offset: index of the first entry, for a block of a larger tensor.

    Returns:
        Scalar, fp32 (fp64 for fp64 logits); 1 for no entries.

    Raises:
        RuntimeError: an argument of the wrong dtype or out of range; names it.

    Source: Concrete subspace learning (arXiv 2312.06173); Philox as in `random_masks`.
    """
    refuse_forward_mode("concrete_mean", logits)
    return torch.ops.fastmerge.concrete_mean(logits, key, temperature, offset)


def _reference(logits, key, temperature, offset):
    check_mask("concrete_mean", logits, temperature, offset)
    dtype = accumulate_dtype(logits)
    if logits.numel() == 0:
        return logits.new_ones((), dtype=dtype)
    return mask_and_slope(logits, key, temperature, offset, dtype)[0].mean()


def _compiled(logits, key, temperature, offset):
    check_mask("concrete_mean", logits, temperature, offset)
    kernels = _native(logits)
    if kernels is None or logits.numel() == 0:
        return _reference(logits, key, temperature, offset)
    total = kernels.concrete_mean(logits.contiguous(), key, temperature, offset)
    return (total[0] / logits.numel()).float()


def _native(logits):
    return native_kernels("concrete_mean", logits) if logits.dtype == torch.float32 else None


def _fake(logits, key, temperature, offset):
    check_mask("concrete_mean", logits, temperature, offset)
    return logits.new_empty((), dtype=accumulate_dtype(logits))


def _setup_context(ctx, inputs, output):
    logits, *ctx.mask = inputs
    ctx.save_for_backward(logits)


def _backward(ctx, grad):
    (logits,) = ctx.saved_tensors
    return torch.ops.fastmerge.concrete_mean_backward(grad, logits, *ctx.mask), None, None, None


register(f"concrete_mean({MASK}) -> Tensor", reference=_reference, compiled=_compiled, fake=_fake)
register_gradient("concrete_mean", _backward, _setup_context)


def _backward_check(grad, logits, temperature, offset):
    check_mask("concrete_mean_backward", logits, temperature, offset)
    check(
        grad.dim() == 0 and grad.device == logits.device,
        lambda: (
            f"concrete_mean_backward: grad is {list(grad.shape)} on {grad.device}, "
            f"expected [] on {logits.device}"
        ),
    )


def _backward_reference(grad, logits, key, temperature, offset):
    _backward_check(grad, logits, temperature, offset)
    dtype = accumulate_dtype(logits)
    slope = mask_and_slope(logits, key, temperature, offset, dtype)[1]
    return (slope * (grad.to(dtype) / max(1, logits.numel()))).to(logits.dtype)


def _backward_compiled(grad, logits, key, temperature, offset):
    _backward_check(grad, logits, temperature, offset)
    kernels = _native(logits)
    if kernels is None or logits.numel() == 0:
        return _backward_reference(grad, logits, key, temperature, offset)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    scale = float(grad) / logits.numel()
    kernels.concrete_mean_backward(logits.contiguous(), key, temperature, offset, out, scale)
    return out


def _backward_fake(grad, logits, key, temperature, offset):
    _backward_check(grad, logits, temperature, offset)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


register(
    f"concrete_mean_backward(Tensor grad, {MASK}) -> Tensor",
    reference=_backward_reference,
    compiled=_backward_compiled,
    fake=_backward_fake,
)
register_no_gradient("concrete_mean_backward")
