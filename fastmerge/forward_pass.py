"""What merged weights compute once in a forward pass of their model: all rows of the coefficients,
and all small weights together.

A bias costs far less to combine than to ask for, and a model has hundreds of biases and norms.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import ops
from .coefficients import Coefficients
from .deltas import Stored
from .merged_refusals import transforms_active

SMALL = 1 << 16  # entries of a weight of one long dimension: biases, norms, class tokens

_running = threading.local()  # {id of the coefficients: the thread's pass}


class ForwardPass:
    """One forward pass of a model with merged weights, in one thread.

    Args:
        coefficients: those of the model's merged weights.
        small: {index: small merged weight of the model}.
    """

    def __init__(self, coefficients: Coefficients, small: Mapping[int, Any]):
        self.coefficients, self.small = coefficients, small
        self.raw = coefficients.raw
        self.version = _version(self.raw)
        self._rows: dict[tuple[bool, bool], list[Tensor]] = {}
        self._values: dict[bool, dict[int, tuple[Tensor, int]]] = {}

    def current(self) -> bool:
        """Whether the coefficients are those that the pass began with."""
        raw = self.coefficients.raw
        return raw is self.raw and _version(raw) == self.version

    def row(self, index: int) -> Tensor:
        """As `Coefficients.row`."""
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if mode not in self._rows:
            self._rows[mode] = self.coefficients.all_rows()
        return self._rows[mode][index]

    def value(self, weight: Any) -> Tensor | None:
        """The combined copy of a small weight, for all its uses in the pass; None for others."""
        found = self.small.get(weight.index)
        if found is None or found.base is not weight.base or torch.is_inference_mode_enabled():
            return None
        mode = torch.is_grad_enabled()
        if mode not in self._values:
            weights = self.small.values()
            rows = torch.stack([self.row(w.spans[0][2]) for w in weights])
            values = ops.weighted_sum([w.base for w in weights], [w.deltas for w in weights], rows)
            written = [(value, value._version) for value in values]
            self._values[mode] = dict(zip(self.small, written, strict=True))
        value, version = self._values[mode][weight.index]
        return value if value._version == version else None  # else a user wrote to it


def running(coefficients: Any) -> ForwardPass | None:
    """The pass that computes with these coefficients now, in this thread.

    None also where a computation must be the same whenever it is done: in compiled graphs, under
    torch.func, and where tensors saved for the backward pass are hooked, as activation
    checkpointing does, which computes again outside of the pass.
    """
    if torch.compiler.is_compiling():
        return None
    found = _running.__dict__.get(id(coefficients))
    if found is None or transforms_active() or not found.current():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return found if hooks is None else None


def begin(coefficients: Any, small: Mapping[int, Any]) -> None:
    """A forward pass of the model that has these coefficients begins in this thread."""
    _running.__dict__[id(coefficients)] = ForwardPass(coefficients, small)


def end(coefficients: Any) -> None:
    """The thread's forward pass of the model that has these coefficients is over."""
    _running.__dict__.pop(id(coefficients), None)


def is_small(weight: Any) -> bool:
    """Whether a merged weight is combined together with others: small, of one long dimension, on
    the CPU."""
    entries = weight.base.numel()
    return (
        0 < entries <= SMALL
        and entries == max(weight.base.shape, default=1)
        and weight.base.device.type == "cpu"
        and isinstance(weight.deltas, Stored)
        and len(weight.spans) == 1
    )


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version
