"""`softmax_entropy`: entropy of each row's softmax; its gradient stores no probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native_kernels, triton_kernels
from ._library import (
    accumulate_dtype,
    check,
    check_float,
    refuse_forward_mode,
    register,
    register_gradient,
    register_no_gradient,
)


def softmax_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy (natural logarithm) of the softmax of each row.

    H = -sum_c p_c log p_c with p = softmax(logits); dH/dlogits_c = -p_c (log p_c + H).

    Args:
        logits: [..., C], fp32/fp16/bf16/fp64, C >= 1. A logit of -inf is probability 0.

    Returns:
        [...] in fp32 (fp64 for fp64 logits). Rows with NaN give NaN.

    Raises:
        RuntimeError: logits is not floating point or has no classes.

    Source: AdaMerging (arXiv 2310.02575), the entropy surrogate; Tent (arXiv 2006.10726).
    """
    refuse_forward_mode("softmax_entropy", logits)
    return torch.ops.fastmerge.softmax_entropy(logits)


def _check(logits):
    check_float("softmax_entropy", "logits", logits)
    check(
        logits.dim() >= 1 and logits.shape[-1] >= 1,
        lambda: f"softmax_entropy: logits has shape {list(logits.shape)}, expected [..., C >= 1]",
    )


def _probabilities(logits):
    log_p = torch.log_softmax(logits.to(accumulate_dtype(logits)), dim=-1)
    return log_p.exp(), log_p


def _reference(logits):
    _check(logits)
    p, log_p = _probabilities(logits)
    return -torch.where(p == 0, 0, p * log_p).sum(-1)


def _compiled(logits):
    """Native on the CPU, Triton on a GPU: there is no CUDA C++ kernel for this op."""
    _check(logits)
    rows = logits.reshape(-1, logits.shape[-1])
    kernels = triton_kernels("softmax_entropy_forward", {"logits": rows})
    if kernels is not None:
        return kernels.softmax_entropy_forward(rows)[0].view(logits.shape[:-1])
    kernels = native_kernels("softmax_entropy", logits) if logits.device.type == "cpu" else None
    if kernels is None:
        return _reference(logits)
    return kernels.softmax_entropy(rows.contiguous())[0].view(logits.shape[:-1])


def _fake(logits):
    _check(logits)
    return logits.new_empty(logits.shape[:-1], dtype=accumulate_dtype(logits))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return (torch.ops.fastmerge.softmax_entropy_backward(grad, ctx.saved_tensors[0]),)


register(
    "softmax_entropy(Tensor logits) -> Tensor", reference=_reference, compiled=_compiled, fake=_fake
)
register_gradient("softmax_entropy", _backward, _setup_context)


def _backward_check(grad, logits):
    _check(logits)
    check(
        grad.shape == logits.shape[:-1] and grad.device == logits.device,
        lambda: (
            f"softmax_entropy_backward: grad is {list(grad.shape)} on {grad.device}, "
            f"expected {list(logits.shape[:-1])} on {logits.device}"
        ),
    )


def _backward_reference(grad, logits):
    _backward_check(grad, logits)
    p, log_p = _probabilities(logits)
    p_log_p = torch.where(p == 0, 0, p * log_p)
    entropy = -p_log_p.sum(-1, keepdim=True)
    slope = -(p_log_p + p * entropy)  # [..., C]
    return (slope * grad.unsqueeze(-1).to(slope.dtype)).to(logits.dtype)


def _backward_compiled(grad, logits):
    _backward_check(grad, logits)
    rows = logits.reshape(-1, logits.shape[-1])
    slope = grad.float().reshape(-1).contiguous()
    kernels = triton_kernels("softmax_entropy_backward", {"logits": rows})
    if kernels is not None:
        entropy, normalizer = kernels.softmax_entropy_forward(rows)
        grad_logits = kernels.softmax_entropy_backward(slope, rows, entropy, normalizer)
        return grad_logits.view(logits.shape)
    kernels = native_kernels("softmax_entropy", logits) if logits.device.type == "cpu" else None
    if kernels is None:
        return _backward_reference(grad, logits)
    rows = rows.contiguous()
    entropy, log_normalizer = kernels.softmax_entropy(rows)
    return kernels.softmax_entropy_backward(rows, entropy, log_normalizer, slope).view(logits.shape)


def _backward_fake(grad, logits):
    _backward_check(grad, logits)
    return logits.new_empty(logits.shape)


register(
    "softmax_entropy_backward(Tensor grad, Tensor logits) -> Tensor",
    reference=_backward_reference,
    compiled=_backward_compiled,
    fake=_backward_fake,
)
register_no_gradient("softmax_entropy_backward")
