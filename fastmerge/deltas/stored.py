"""Deltas stored as tensors of the weight's own shape."""

from __future__ import annotations

from ._format import Stored


class Experts(Stored):
    """The experts' weights W_k themselves: tau_k = W_k - base, subtracted in registers.

    Args:
        tensors: K tensors [*] of the base's shape and one dtype.
    """

    experts = True


class Dense(Stored):
    """Task vectors tau_k, stored whole.

    Args:
        tensors: K tensors [*] of the base's shape and one dtype.
    """

    experts = False
