"""Values of a recipe's parameters: numbers, gradients over layers, and choices by tensor name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .dialect import REQUIRED, Kind, Knob
from .yaml_reader import RecipeError

Scalar = float | int | bool | str


@dataclass(frozen=True)
class Choice:
    """One case of a setting: its values hold for tensors whose name contains `pattern`.

    Attributes:
        pattern: part of a tensor's name; None for every tensor.
        values: one value, or several that change over the layers.
    """

    pattern: str | None
    values: tuple[Scalar, ...]


Setting = tuple[Choice, ...]


def read_setting(raw: Any, kind: Kind, where: str) -> Setting:
    """A parameter's value: a scalar, a gradient (list), or a list of {filter, value}.

    Raises:
        RecipeError: a value of the wrong kind, an empty list, or a mixture. Names the place.
    """
    if isinstance(raw, list) and any(isinstance(entry, dict) for entry in raw):
        return tuple(_choice(entry, kind, f"{where}[{n}]") for n, entry in enumerate(raw))
    if isinstance(raw, dict):
        return (_choice(raw, kind, where),)
    return (Choice(None, _values(raw, kind, where)),)


def _choice(raw: Any, kind: Kind, where: str) -> Choice:
    if not isinstance(raw, dict) or not set(raw) <= {"filter", "value"} or "value" not in raw:
        raise RecipeError(f"{where}: expected a mapping with value and filter")
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise RecipeError(f"{where}.filter: expected a part of tensor names, got {pattern!r}")
    values = _values(raw["value"], kind, f"{where}.value")
    return Choice(None if pattern in (None, "*") else pattern, values)


def _values(raw: Any, kind: Kind, where: str) -> tuple[Scalar, ...]:
    if isinstance(raw, list):
        if not raw:
            raise RecipeError(f"{where}: an empty list, expected values over the layers")
        return tuple(_scalar(value, kind, f"{where}[{n}]") for n, value in enumerate(raw))
    return (_scalar(raw, kind, where),)


def _scalar(raw: Any, kind: Kind, where: str) -> Scalar:
    if kind == "bool":
        if isinstance(raw, bool):
            return raw
    elif kind == "mode":
        if isinstance(raw, (bool, str)):
            return raw
    elif kind == "whole":
        if isinstance(raw, int) and not isinstance(raw, bool) and abs(raw) < 1 << 31:
            return raw
    elif kind == "text":
        if isinstance(raw, str):
            return raw
    elif not isinstance(raw, bool):
        number = _number(raw)
        if number is not None:
            return number
    wanted = {
        "number": "a finite number",
        "bool": "true or false",
        "whole": "a whole number",
        "mode": "true, false or a word",
    }
    shown = repr(raw) if len(repr(raw)) <= 60 else f"a {type(raw).__name__}"
    raise RecipeError(f"{where}: expected {wanted.get(kind, kind)}, got {shown}")


def _number(raw: Any) -> float | None:
    """A finite number; YAML reads 1e-5, without a point, as text."""
    if not isinstance(raw, (int, float, str)):
        return None
    try:
        value = float(raw)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def evaluate(setting: Setting, tensor: str, t: float) -> Scalar | None:
    """A setting's value for one tensor: its first case that matches; None if none does.

    Gradients are linear between equally spaced points: n values v at position x = t (n - 1) give
    v[i] + (x - i) (v[i + 1] - v[i]), i = floor(x). True, false and text take v[i].

    Args:
        setting: the parameter.
        tensor: name of the output's tensor.
        t: where its layer is, 0 for the first and 1 for the last of a slice.
    """
    for choice in setting:
        if choice.pattern is None or choice.pattern in tensor:
            return _interpolate(choice.values, t)
    return None


def _interpolate(values: tuple[Scalar, ...], t: float) -> Scalar:
    if len(values) == 1:
        return values[0]
    position = t * (len(values) - 1)
    low = min(int(position), len(values) - 1)
    if isinstance(values[low], (bool, str)):
        return values[low]
    high = min(low + 1, len(values) - 1)
    share = position - low
    return (1 - share) * values[low] + share * values[high]


def resolve(
    name: str, knob: Knob, levels: Iterable[Mapping[str, Setting]], tensor: str, t: float
) -> Scalar | None:
    """A parameter's value: from the first level that has one for this tensor, else its default.

    Args:
        levels: settings from the most to the least specific: model, slice, recipe.

    Raises:
        KeyError: none has one and there is no default.
    """
    for level in levels:
        if name in level:
            value = evaluate(level[name], tensor, t)
            if value is not None:
                return value
    if knob.default is REQUIRED:
        raise KeyError(name)
    return knob.default
