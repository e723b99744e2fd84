"""Relaxed masks that are never stored: what they are, and the arguments that all their ops take."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check, check_float
from .random_masks import draws_of

MASK = "Tensor logits, int? key, float temperature, int offset"  # of the ops' schemas


def mask_and_slope(
    logits: Tensor, key: int | None, temperature: float, offset: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A relaxed mask m and its derivative dm/dlogits, both like logits, in plain PyTorch.

    m = sigmoid((logits + log u - log(1 - u)) / temperature), dm = m (1 - m) / temperature;
    u = (draw + 1/2) / 2^32 with the 32-bit `draws` of the entries under `key`, k = 0. Without a key
    u = 1/2. At temperature 0, m is 1 where the sum in parentheses is positive, else 0, and dm = 0.

    Args:
        logits: [*].
        key: 64 bits, for example of `random_key`, or None.
        temperature: of the relaxation.
        offset: index of the first entry, for a block of a larger tensor.
        dtype: of the arithmetic and the results.
    """
    x = logits.to(dtype)
    if key is not None:
        entries = torch.arange(offset, offset + logits.numel(), device=logits.device)
        x = x + logistic_noise(entries, key, dtype).view(logits.shape)
    if temperature == 0:
        return torch.where(x.isnan(), x, (x > 0).to(dtype)), torch.zeros_like(x)
    x = x / temperature
    mask = x.sigmoid()
    return mask, mask * (-x).sigmoid() / temperature


def logistic_noise(entries: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    """log u - log(1 - u) of entries with these indices, like `entries` in `dtype`."""
    drawn = draws_of(entries, 0, key)
    above, below = drawn.to(dtype) + 0.5, ((1 << 32) - 1 - drawn).to(dtype) + 0.5
    return (above / below).log()


def check_mask(
    op: str, logits: Tensor, temperature: float, offset: int, like: Tensor | None = None
) -> None:
    """Logits like the tensor `like`, and a mask that they can give.

    Raises:
        RuntimeError: names the argument.
    """
    check_float(op, "logits", logits)
    check(
        like is None or (logits.shape == like.shape and logits.device == like.device),
        lambda: (
            f"{op}: logits is {list(logits.shape)} on {logits.device}, "
            f"expected {list(like.shape)} on {like.device}"
        ),
    )
    check(
        0 <= temperature < float("inf"),
        lambda: f"{op}: temperature must be finite and not negative, got {temperature}",
    )
    check(offset >= 0, lambda: f"{op}: offset must not be negative, got {offset}")
