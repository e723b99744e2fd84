"""Coefficients that follow from depth, to start learning from or to merge by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .blocks import block_positions
from .checking import Patterns, select_names
from .coefficients import Coefficients
from .methods.anchor_ramp import ramp_weights
from .methods.lines import scale_at

Target = nn.Module | Mapping[str, Any]
Rows = Callable[[str, float | None], list[float]]


def lines_coefficients(
    target: Target,
    experts: Sequence[str] | Mapping[str, Any],
    *,
    alpha: float | None = None,
    beta: float = 0.3,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Coefficients:
    """Coefficients alpha + beta x, x a block's depth from 0 (first) to 1 (last): LiNeS.

    `fastmerge.merge(base, experts, coefficients=...)` with them is method "lines", bit by bit;
    `fastmerge.attach(model, experts, init=...)` learns from there.

    Args:
        target: the model, its state dict, or the shapes of its tensors by name.
        experts: the experts, or their names.
        alpha: in the first block and outside the blocks, by default 1 / K.
        beta: what the last block's have more.
        include, exclude: which tensors get coefficients: glob patterns or a function of the name.

    Source: LiNeS (arXiv 2410.17146).
    """
    labels = _labels(experts)
    start = 1 / len(labels) if alpha is None else alpha

    def row(name: str, depth: float | None) -> list[float]:
        return [scale_at(depth, start, beta)] * len(labels)

    return _scheduled(target, labels, row, include, exclude)


def anchor_coefficients(
    target: Target,
    experts: Sequence[str] | Mapping[str, Any],
    *,
    anchor: int | str = 0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Coefficients:
    """Coefficients that average the first blocks and turn into one expert's towards the last.

    What method "anchor_ramp" weights the experts by; they add up to 1 in every tensor.

    Args:
        target, experts, include, exclude: as for `lines_coefficients`.
        anchor: the expert that the last block is taken from, its name or position.

    Raises:
        ValueError: there is no such expert, or only one.

    Source: arXiv 2409.15813.
    """
    labels = _labels(experts)
    at = labels.index(anchor) if anchor in labels else anchor
    if not isinstance(at, int) or not 0 <= at < len(labels) or len(labels) < 2:
        raise ValueError(f"anchor {anchor!r} is none of two or more experts: {labels}")

    def row(name: str, depth: float | None) -> list[float]:
        return ramp_weights(name, depth, at, len(labels))

    return _scheduled(target, labels, row, include, exclude)


def _labels(experts: Sequence[Any] | Mapping[str, Any]) -> list[str]:
    """Names of the experts, as `fastmerge.attach` gives them to a list of models."""
    if isinstance(experts, Mapping) or all(isinstance(e, str) for e in experts):
        labels = list(experts)
    else:
        labels = [f"expert{k}" for k in range(len(experts))]
    if not labels:
        raise ValueError("coefficients need at least one expert, got none")
    return labels


def _scheduled(
    target: Target, experts: list[str], row: Rows, include: Patterns, exclude: Patterns
) -> Coefficients:
    if isinstance(target, nn.Module):
        shapes = {n: list(p.shape) for n, p in target.named_parameters() if p.is_floating_point()}
    else:
        shapes = {
            name: list(getattr(tensor, "shape", tensor))
            for name, tensor in target.items()
            if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point()
        }
    names = select_names(list(shapes), include, exclude)
    depths = block_positions(names)
    return Coefficients(
        names,
        experts,
        init=torch.tensor([row(name, depths[name]) for name in names]),
        clamp=None,
        shapes=[shapes[name] for name in names],
    )
