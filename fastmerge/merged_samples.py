"""What functions do with merged weights whose coefficients differ from sample to sample.

Linear layers hand the rows on to `ops.merged_linear`; lookups, norms and whatever else small
tensors are used for get the values of every sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import ops
from .deltas import Stored
from .ops._library import accumulate_dtype
from .sample_values import SampleValues

MAX_VALUES = 2**28  # entries that one tensor may have when written out for every sample


def of_samples(weight: Any, dtype: torch.dtype | None = None) -> SampleValues:
    """A merged weight written out for every sample.

    Args:
        weight: a merged weight with row coefficients [B, K].
        dtype: of the values, by default the weight's.

    Raises:
        RuntimeError: these would be more than `MAX_VALUES` entries.
    """
    base, rows = weight.base, _rows(weight)
    if len(rows) * base.numel() > MAX_VALUES:
        raise RuntimeError(
            f"merged weight {weight.name!r} of shape {list(base.shape)} would have to be built for "
            f"each of {len(rows)} samples: use it in linear layers, embeddings or patch "
            "convolutions, or give all samples of a batch the same coefficients"
        )
    weight.count("samples", len(rows))
    values = _combine(base, weight.deltas, rows).view(len(rows), *base.shape)
    return SampleValues(values.to(dtype or base.dtype), weight.name)


def _rows(weight: Any) -> Tensor:
    return weight.row(weight.spans[0][2])


def _combine(base: Tensor, deltas: Any, rows: Tensor) -> Tensor:
    """base + sum_k rows_bk tau_k for every b, in fp32 or fp64: [B, entries of base]."""
    stored = deltas.tensors[0] if isinstance(deltas, Stored) else None
    dtype = accumulate_dtype(base, stored, rows)
    taus = torch.stack([tau.reshape(-1) for tau in deltas.task_vectors(base, dtype)])
    return torch.addmm(base.reshape(1, -1).to(dtype), rows.to(dtype), taus)


def _by_batch(x: Tensor, weight: Any, batch: int) -> tuple[Tensor, tuple[int, ...], bool]:
    """Where the samples are in activations.

    Returns:
        The activations [B, .., n], or [T, B, n] within attention; the shape of what differs from
        sample to sample, but for n; whether a first dimension [B * T] was taken apart.

    Raises:
        RuntimeError: the first dimension is neither B nor, in a matrix, B * T.
    """
    lead = x.shape[:-1]
    if weight.coefficients.batch_second and lead:
        if len(lead) == 1 and lead[0] % batch == 0:
            return x.unflatten(0, (lead[0] // batch, batch)), (1, batch), True
        if len(lead) == 2 and lead[1] == batch:
            return x, (1, batch), False
    elif lead and lead[0] == batch:
        return x, (batch, *(1 for _ in lead[1:])), False
    elif len(lead) == 1 and lead[0] % batch == 0 and not _picks_tokens(weight):
        return x.unflatten(0, (batch, lead[0] // batch)), (batch, 1), True
    raise RuntimeError(
        f"merged weight {weight.name!r} has coefficients for {batch} samples, but meets "
        f"activations of shape {list(x.shape)}, in whose first dimension the samples cannot be "
        "told apart"
    )


def _picks_tokens(weight: Any) -> bool:
    """Whether tokens reach the weight in an order of their own, as in mixtures of experts."""
    return weight.is_part or ".experts." in weight.name


def linear(how: str, x: Tensor, weight: Any, bias: Any, transpose: bool = False) -> Tensor:
    """x W_b^T + bias_b for every sample b, [..., O]; x W_b with `transpose`."""
    rows = _rows(weight)
    x, lead, flattened = _by_batch(x, weight, len(rows))
    weight.count(how, x.shape[:-1].numel(), x.dtype, transpose=transpose)
    base, deltas = weight.base, weight.deltas
    if base.dim() > 2:
        base, deltas = base.flatten(1), deltas.flat()
    shared = bias if isinstance(bias, Tensor) else None
    lam = rows.view(*lead, rows.shape[1])
    y = ops.merged_linear(x, base, deltas, lam, shared, transpose=transpose)
    if bias is not None and shared is None:
        own = bias.data.view(*lead, -1)
        y = y + own if y.requires_grad else y.add_(own)  # autograd forbids writing to a view
    return y.flatten(0, 1) if flattened else y


def embedding(ids: Tensor, weight: Any, padding_idx: int | None) -> Any:
    """Looked-up rows, each with its sample's coefficients.

    Returns:
        [*ids, D] for ids [B, ..] or [1, ..], the latter becoming [B, ..]; `SampleValues` for ids
        without a batch dimension.
    """
    rows, width = _rows(weight), weight.base.shape[1]
    flat = ids.reshape(-1)
    weight.count("rows", flat.numel())
    base, deltas = weight.base.index_select(0, flat), weight.deltas.gather(flat)  # [R, D]
    name = weight.name
    batched = ids.dim() > 1 and not any(n in name for n in weight.coefficients.shared_lookups)
    if batched and ids.shape[0] == len(rows):
        stored = deltas.tensors[0] if isinstance(deltas, Stored) else None
        dtype = accumulate_dtype(base, stored, rows)
        lam = rows.to(dtype).repeat_interleave(ids[0].numel(), 0)  # [R, K]
        values = base.to(dtype)
        for k, tau in enumerate(deltas.task_vectors(base, dtype)):
            values = torch.addcmul(values, lam[:, k : k + 1], tau)
        values = values.view(*ids.shape, width)
    else:
        values = _combine(base, deltas, rows).view(len(rows), *ids.shape, width)
    values = values.to(weight.base.dtype)
    if padding_idx is not None:
        padding = padding_idx if padding_idx >= 0 else weight.base.shape[0] + padding_idx
        values = torch.where((ids == padding).unsqueeze(-1), values.detach(), values)
    if batched and ids.shape[0] == len(rows):
        return values
    looked_up = SampleValues(values, name)
    return looked_up.of_batch() if batched and ids.shape[0] == 1 else looked_up


def norm(normalize: Any, x: Tensor, dims: int, weight: Any, bias: Any, merged: Any) -> Tensor:
    """normalize(x) * w_b + bias_b, in fp32 or fp64 and rounded once.

    Args:
        normalize: layer or RMS norm without weight and bias.
        x: [B, ..].
        dims: number of dimensions that are normalized.
        weight, bias: merged weights, tensors or None.
        merged: one of them that has row coefficients.
    """
    dtype, out = accumulate_dtype(x, merged.base), x.dtype
    if torch.is_autocast_enabled(x.device.type):
        y = normalize(x)  # in the dtype that autocast chooses
        out = y.dtype
    else:
        y = normalize(x.to(dtype))
    y, lead, _ = _by_batch(y.flatten(x.dim() - dims), merged, len(_rows(merged)))
    w, b = (_beside(p, lead, dtype) for p in (weight, bias))
    if w is not None and b is not None:
        y = torch.addcmul(b, y.to(dtype), w)
    elif w is not None or b is not None:
        y = y * w if b is None else y + b
    return y.to(out).reshape(x.shape)


def _beside(parameter: Any, lead: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A norm's parameter as it broadcasts over activations."""
    if parameter is None:
        return None
    if getattr(parameter, "per_sample", False):
        return of_samples(parameter, dtype).data.view(*lead, -1)
    parameter = parameter.combined() if hasattr(parameter, "combined") else parameter
    return parameter.to(dtype).flatten()


@contextlib.contextmanager
def batch_second(weights: tuple) -> Iterator[None]:
    """Activations are [T, B, ..] for these merged weights, as within nn.MultiheadAttention."""
    coefficients = [w.coefficients for w in weights if getattr(w, "per_sample", False)]
    for module in coefficients:
        module.batch_second = True
    try:
        yield
    finally:
        for module in coefficients:
            module.batch_second = False
