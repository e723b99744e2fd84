"""Triton kernels, one op a file; installed as fastmerge.kernels.

Importing this package needs no Triton. Ask `supports` first; the launchers raise with the same
reason where it says no.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .launching import device_limits, is_aligned, refusal

_HOMES = {
    "coefficient_grad": ("linear_coefficient_grad",),
    "lowrank_linear": ("lowrank_linear_forward",),
    "masked_coefficient_grad": ("linear_masked_coefficient_grad",),
    "masked_linear": ("masked_linear_backward", "masked_linear_forward"),
    "merged_linear": ("merged_linear_backward_x", "merged_linear_forward"),
    "residual_adapter": ("residual_adapter_forward",),
    "row_linear": ("row_linear_backward", "row_linear_forward"),
    "softmax_entropy": ("softmax_entropy_backward", "softmax_entropy_forward"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["supports", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def supports(
    function: str, tensors: Mapping[str, Tensor | None], deltas: Sequence[Tensor] | None = None
) -> tuple[bool, str]:
    """Whether a launcher of this package can run, and the reason if it cannot.

    Args:
        function: name of the launcher, for example "merged_linear_forward".
        tensors: its tensor arguments by name, activations (or logits) first; None where absent.
        deltas: the K deltas, for the launchers that take them.
    """
    if function not in _HOME_OF:
        raise ValueError(f"function must be one of {', '.join(_HOME_OF)}, got {function!r}")
    reason = refusal(function, tensors, deltas)
    if reason is None and deltas is not None:
        reason = _shared_memory_refusal(function, tensors, deltas)
    return reason is None, reason or ""


def _shared_memory_refusal(
    function: str, tensors: Mapping[str, Tensor | None], deltas: Sequence[Tensor]
) -> str | None:
    module = importlib.import_module(f".{_HOME_OF[function]}", __name__)
    x, base, delta = next(iter(tensors.values())), tensors.get("base"), deltas[0]
    rows, base_dtype = x.shape[:-1].numel(), delta.dtype if base is None else base.dtype
    capability, limit = device_limits(x.device)
    aligned = is_aligned(*(t for t in (x, base) if t is not None), *deltas)
    try:
        if function in ("linear_coefficient_grad", "linear_masked_coefficient_grad"):
            module.configurations(*delta.shape, x.dtype, delta.dtype, aligned, limit)
        elif function.startswith(("row_linear", "masked_linear")):
            module.configurations(rows, x.dtype, base_dtype, delta.dtype, aligned, limit)
        else:
            dtypes = x.dtype, base_dtype, delta.dtype
            module.configurations(rows, *dtypes, len(deltas), aligned, capability, limit)
    except RuntimeError as error:
        return str(error)
    return None
