"""Copies of a model that share its parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..attachment import parameter_places


def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other values of some parameters and buffers.

    Args:
        model: any model; its parameters that keep their values are shared with the copy.
        values: {name of a parameter or buffer: its value}; tied parameters stay tied.
    """
    clone = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    places, _ = parameter_places(clone)
    buffers = dict(clone.named_buffers())
    for name, value in values.items():
        if name in places:
            module, attribute = places[name][0]
            new = nn.Parameter(value, module._parameters[attribute].requires_grad)
            for module, attribute in places[name]:
                module._parameters[attribute] = new
        else:
            with torch.no_grad():
                buffers[name].copy_(value)
    return clone
