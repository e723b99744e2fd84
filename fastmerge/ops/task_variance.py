"""`task_variance`: how much the K task vectors differ at every entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native_kernels
from ._library import (
    accumulate_dtype,
    as_task_vector,
    check_source,
    register,
    register_no_gradient,
)


def task_variance(deltas: Sequence[Tensor], *, base: Tensor | None = None) -> Tensor:
    """Variance over k of the task vectors' values: sum_k (tau_k - mean)^2 / K.

    Args:
        deltas: K tensors [*] of one dtype: task vectors, or experts with a base.
        base: [*], subtracted from the deltas.

    Returns:
        [*] in fp32, fp64 if an input is fp64.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; names the argument.

    Source: the selection of SCE in FuseChat (arXiv 2408.07990).
    """
    return torch.ops.fastmerge.task_variance(list(deltas), base)


def _reference(deltas, base):
    check_source("task_variance", deltas, base)
    dtype = accumulate_dtype(deltas[0], base)
    taus = [as_task_vector(base, d, base is not None, dtype) for d in deltas]
    mean = torch.zeros_like(taus[0])
    for tau in taus:
        mean = mean + tau
    mean = mean / len(taus)
    squares = torch.zeros_like(mean)
    for tau in taus:
        squares = squares + (tau - mean) * (tau - mean)
    return (squares / len(taus)).contiguous()


def _compiled(deltas, base):
    kernels = native_kernels("task_variance", *deltas[:1], base)
    if kernels is None:
        return _reference(deltas, base)
    out = _fake(deltas, base)
    origin = None if base is None else base.contiguous()
    kernels.task_variance(origin, [d.contiguous() for d in deltas], out)
    return out


def _fake(deltas, base):
    check_source("task_variance", deltas, base)
    return deltas[0].new_empty(deltas[0].shape, dtype=accumulate_dtype(deltas[0], base))


register(
    "task_variance(Tensor[] deltas, Tensor? base) -> Tensor",
    reference=_reference,
    compiled=_compiled,
    fake=_fake,
)
register_no_gradient("task_variance")
