"""Storage formats of the K deltas of one tensor: what is kept, and how tau_k is read from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


class Deltas:
    """K tensors of one shape and dtype that stand for the task vectors of one weight.

    Attributes:
        tensors: K tensors [*].
        experts: True if the tensors are the experts' weights, so that tau_k = tensors_k - base,
            subtracted in registers; False if they are task vectors.
    """

    experts: bool

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tuple(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> Deltas:
        """The same format with `function` applied to every tensor, for views and row gathers."""
        return type(self)([function(t) for t in self.tensors])

    def rows(self, start: int, stop: int) -> Deltas:
        """Views of rows start to stop."""
        return self.map(lambda t: t[start:stop])


class Experts(Deltas):
    """The experts' weights W_k themselves: tau_k = W_k - base, subtracted in registers.

    Args:
        tensors: K tensors [*] of the base's shape and one dtype.
    """

    experts = True


class Dense(Deltas):
    """Task vectors tau_k, stored whole.

    Args:
        tensors: K tensors [*] of the base's shape and one dtype.
    """

    experts = False
