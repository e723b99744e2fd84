"""Relaxed masks that are never stored, on the CPU: `concrete_mean` and `concrete_combine`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import address, code
from . import calls


def _mask(logits: Tensor, key: int | None, temperature: float, offset: int) -> tuple:
    """The mask's part of a kernel's arguments."""
    steepness = 1 / temperature if temperature else 0.0
    return logits.data_ptr(), (key or 0) % (1 << 64), offset, steepness, key is not None


def concrete_mean(logits: Tensor, key: int | None, temperature: float, offset: int) -> Tensor:
    """The sum of the mask's entries, fp64 [1].

    Args:
        logits: fp32.
        key: 64 bits, or None for no noise.
        temperature: 0 for a mask of zeros and ones.
        offset: index of the first entry in the whole tensor.
    """
    total = calls.doubles(1)
    scratch = calls.doubles(extensions.cpu.scratch_doubles(logits.numel(), 1))
    extensions.cpu.concrete_mean(
        *_mask(logits, key, temperature, offset),
        total.data_ptr(),
        scratch.data_ptr(),
        logits.numel(),
        torch.get_num_threads(),
    )
    return total


def concrete_mean_backward(
    logits: Tensor, key: int | None, temperature: float, offset: int, out: Tensor, scale: float
) -> None:
    """Write scale times the mask's derivative with respect to the logits into `out`, fp32.

    Args:
        logits, key, temperature, offset: as for `concrete_mean`.
        out: fp32 like logits.
        scale: a factor.
    """
    extensions.cpu.concrete_mean_backward(
        *_mask(logits, key, temperature, offset),
        out.data_ptr(),
        scale,
        logits.numel(),
        torch.get_num_threads(),
    )


def concrete_combine(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    logits: Tensor,
    coefficients: Tensor,
    key: int | None,
    temperature: float,
    offset: int,
    *,
    experts: bool,
    out: Tensor | None = None,
    grad: Tensor | None = None,
    grad_logits: Tensor | None = None,
) -> Tensor | None:
    """Write base + sum_k coefficients_k mask tau_k into `out`, and return the inner products of
    `grad` with mask tau_k; what they share is read and drawn once.

    Args:
        base: contiguous, like deltas, logits, out and grad; None is zeros, where not subtracted.
        deltas: K tensors of one size.
        logits, key, temperature, offset: as for `concrete_mean`.
        coefficients: fp32 [K].
        experts: whether deltas are fine-tuned weights.
        out: may be base; None: no sum.
        grad: None: no inner products.
        grad_logits: fp32, gets the logits' gradient; needs `grad`.

    Returns:
        fp64 [K], None without `grad`.
    """
    size, count = logits.numel(), len(deltas)
    dots = scratch = None
    if size == 0:  # without addresses
        return None if grad is None else torch.zeros(count, dtype=torch.float64)
    if grad is not None:
        dots = calls.doubles(count)
        scratch = calls.doubles(extensions.cpu.scratch_doubles(size, count))
    extensions.cpu.concrete_combine(
        calls.task_vectors(base, deltas, experts),
        *_mask(logits, key, temperature, offset),
        coefficients.data_ptr(),
        address(out),
        address(grad),
        address(grad_logits),
        address(dots),
        address(scratch),
        size,
        code([logits if out is None else out]),
        code([logits if grad is None else grad]),
        torch.get_num_threads(),
    )
    return dots
