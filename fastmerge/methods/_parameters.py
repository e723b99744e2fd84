"""Parameters that hold for all experts, or have a value for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

LARGEST = torch.finfo(torch.float32).max  # what is larger becomes Inf when it is computed with


class PerExpert:
    """A number, or K numbers, one per expert.

    Args:
        name: the parameter's name, for messages.
        value: the number or numbers.
        low, high: smallest and largest value allowed.

    Raises:
        ValueError: a value is not a finite number within the limits.
    """

    def __init__(
        self,
        name: str,
        value: float | Sequence[float],
        low: float = -math.inf,
        high: float = math.inf,
    ):
        self.name = name
        self.several = isinstance(value, Sequence)
        self.numbers = [check_number(name, v, low, high) for v in value] if self.several else value
        if not self.several:
            check_number(name, value, low, high)

    def check(self, count: int) -> None:
        """Raise ValueError unless there is a number for each of `count` experts."""
        if self.several and len(self.numbers) != count:
            raise ValueError(f"{self.name} has {len(self.numbers)} values for {count} experts")

    def always(self, number: float) -> bool:
        """Whether every expert has this number."""
        return all(n == number for n in (self.numbers if self.several else [self.numbers]))

    def of(self, count: int) -> list[float]:
        """The numbers of `count` experts."""
        return [float(n) for n in (self.numbers if self.several else [self.numbers] * count)]


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """The value, if it is a number between low and high that is finite in fp32."""
    good = isinstance(value, (int, float)) and -LARGEST <= value <= LARGEST
    if not good or not low <= value <= high:
        limits = "" if (low, high) == (-math.inf, math.inf) else f" in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number{limits}, got {value!r}")
    return value


def share(weights: Sequence[float], smallest: float) -> float:
    """The sum that weights are divided by, 1 where its magnitude is below `smallest`."""
    total = math.fsum(weights)
    return 1.0 if abs(total) < smallest else total
