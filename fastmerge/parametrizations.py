"""How coefficients follow from the raw values that are trained: identity, softmax, tanh, slerp.

Each is a pair: raw values [..., K] to coefficients [..., K], and back for the initial ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MARGIN = 1e-6  # cosines stay this far from 1 and -1, where sin W would be zero


@dataclass(frozen=True)
class Parametrization:
    """A map from raw values to coefficients, both [..., K].

    Attributes:
        forward: (raw, Gram matrix of the task vectors [..., K, K] or None) -> coefficients.
        inverse: (coefficients, Gram matrix or None) -> raw values that give them.
        needs_gram: whether the Gram matrix is used.
    """

    forward: Callable[[Tensor, Tensor | None], Tensor]
    inverse: Callable[[Tensor, Tensor | None], Tensor]
    needs_gram: bool = False


def _identity(values: Tensor, gram: Tensor | None) -> Tensor:
    return values


def _softmax(raw: Tensor, gram: Tensor | None) -> Tensor:
    """lambda_k = exp(raw_k) / sum_j exp(raw_j): positive, adding up to 1 (model soups' learned
    soup, arXiv 2203.05482)."""
    return raw.softmax(-1)


def _log(coefficients: Tensor, gram: Tensor | None) -> Tensor:
    if not bool((coefficients > 0).all()):
        raise ValueError("softmax coefficients are positive: init must be, too")
    return coefficients.log() - coefficients.sum(-1, keepdim=True).log()


def _tanh(raw: Tensor, gram: Tensor | None) -> Tensor:
    """lambda_k = tanh(raw_k), in (-1, 1) (SuperMerge, arXiv 2412.10416)."""
    return raw.tanh()


def _atanh(coefficients: Tensor, gram: Tensor | None) -> Tensor:
    if not bool((coefficients.abs() < 1).all()):
        raise ValueError("tanh coefficients lie in (-1, 1): init must, too")
    return coefficients.atanh()


def _slerp(raw: Tensor, gram: Tensor) -> Tensor:
    """Angles and a length in the span of the task vectors (Self Positioning, arXiv 2410.15035).

    With raw = (alpha_1, ..., alpha_{K-1}, rho) and d_1 = tau_1,
        d_{j+1} = [sin((1 - alpha_j) W) d_j + sin(alpha_j W) tau_{j+1}] / sin W,
        cos W = <d_j, tau_{j+1}> / (|d_j| |tau_{j+1}|),
    the merged task vector is rho d_K; its coefficients are returned. Experts beyond two are folded
    in one by one.
    """
    count = raw.shape[-1]
    unit = torch.eye(count, dtype=raw.dtype, device=raw.device)
    direction = unit[0].expand(raw.shape)
    for j in range(1, count):
        old, new = _weights(raw[..., j - 1], _angle(direction, j, gram))
        direction = old.unsqueeze(-1) * direction + new.unsqueeze(-1) * unit[j]
    return raw[..., -1:] * direction


def _from_slerp(coefficients: Tensor, gram: Tensor) -> Tensor:
    """With r the ratio of the new weight to the old, tan(alpha W) = r sin W / (1 + r cos W)."""
    if not bool((coefficients > 0).all()):
        raise ValueError("slerp starts between the task vectors: init must be positive")
    count = coefficients.shape[-1]
    unit = torch.eye(count, dtype=coefficients.dtype, device=coefficients.device)
    direction, raw = unit[0].expand(coefficients.shape), []
    for j in range(1, count):
        angle = _angle(direction, j, gram)
        # direction[0] and coefficients[0] belong to the same, first task vector
        ratio = coefficients[..., j] * direction[..., 0] / coefficients[..., 0]
        alpha = torch.atan2(ratio * angle.sin(), 1 + ratio * angle.cos()) / angle
        raw.append(alpha)
        old, new = _weights(alpha, angle)
        direction = old.unsqueeze(-1) * direction + new.unsqueeze(-1) * unit[j]
    return torch.stack([*raw, coefficients[..., 0] / direction[..., 0]], -1)


def _angle(direction: Tensor, j: int, gram: Tensor) -> Tensor:
    """Angle between sum_k direction_k tau_k and tau_j; a right angle where one of them is zero."""
    row = gram[..., j, :]
    squared = (direction.unsqueeze(-2) @ gram @ direction.unsqueeze(-1))[..., 0, 0]
    product = (direction * row).sum(-1)
    size = (squared * gram[..., j, j]).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return (product / size).clamp(_MARGIN - 1, 1 - _MARGIN).acos()


def _weights(alpha: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return ((1 - alpha) * angle).sin() / angle.sin(), (alpha * angle).sin() / angle.sin()


PARAMETRIZATIONS: dict[str, Parametrization] = {
    "identity": Parametrization(_identity, _identity),
    "softmax": Parametrization(_softmax, _log),
    "tanh": Parametrization(_tanh, _atanh),
    "slerp": Parametrization(_slerp, _from_slerp, needs_gram=True),
}
