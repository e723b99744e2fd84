"""`softmax_entropy` on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extensions
from ..arguments import code


def softmax_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and log-sum-exp of every row, both fp32 [R].

    Args:
        logits: [R, C] with unit stride along C.
    """
    rows, cols = logits.shape
    entropy = torch.empty(rows, dtype=torch.float32)
    lse = torch.empty(rows, dtype=torch.float32)
    extensions.cpu.softmax_entropy(
        logits.data_ptr(),
        entropy.data_ptr(),
        lse.data_ptr(),
        rows,
        cols,
        logits.stride(0),
        code([logits]),
        torch.get_num_threads(),
    )
    return entropy, lse


def softmax_entropy_backward(
    logits: Tensor, entropy: Tensor, lse: Tensor, grad_entropy: Tensor
) -> Tensor:
    """Gradient of the entropy, -p (log p + H) * grad, in the logits' dtype [R, C].

    Args:
        logits: [R, C] with unit stride along C.
        entropy, lse: fp32 [R], the results of `softmax_entropy`.
        grad_entropy: fp32 [R].
    """
    rows, cols = logits.shape
    grad_logits = torch.empty(rows, cols, dtype=logits.dtype)
    extensions.cpu.softmax_entropy_backward(
        logits.data_ptr(),
        entropy.data_ptr(),
        lse.data_ptr(),
        grad_entropy.data_ptr(),
        grad_logits.data_ptr(),
        rows,
        cols,
        logits.stride(0),
        grad_logits.stride(0),
        code([logits]),
        torch.get_num_threads(),
    )
    return grad_logits
