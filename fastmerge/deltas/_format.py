"""What every storage format of deltas offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..ops._library import as_task_vector


class Deltas:
    """How the K task vectors of one weight [*] are stored, and read.

    A format either has the attributes `tensors` and `experts` (`Experts`, `Dense`), from which the
    ops read tau_k, or it is an `OwnOperations`, whose methods the ops call.
    """

    def __len__(self) -> int:
        """K."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes stored."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Deltas:
        """Rows start to stop of the first dimension, as views where the format allows."""
        raise NotImplementedError

    def entry(self, index: int) -> Deltas:
        """Entry `index` of the first dimension: deltas of one dimension less."""
        raise NotImplementedError

    def gather(self, ids: Tensor) -> Deltas:
        """Rows `ids` [R] of the first dimension, copied, for looked-up rows of an embedding."""
        raise NotImplementedError

    def flat(self) -> Deltas:
        """All dimensions but the first as one: deltas of [O, I], for convolution kernels."""
        raise NotImplementedError

    def task_vectors(self, base: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """The K task vectors written out, like base, one after the other."""
        raise NotImplementedError


class OwnOperations(Protocol):
    """A format that answers for the ops itself, differentiably, with its own kernels."""

    def weighted_sum(
        self, base: Tensor, coefficients: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """As `ops.weighted_sum` of one tensor: base + sum_k coefficients_k tau_k."""
        ...

    def merged_linear(
        self,
        x: Tensor,
        base: Tensor,
        coefficients: Tensor,
        bias: Tensor | None = None,
        transpose: bool = False,
    ) -> Tensor:
        """As `ops.merged_linear`; coefficients [K] or row coefficients."""
        ...

    def coefficient_grad(self, grad_weight: Tensor, base: Tensor | None = None) -> Tensor:
        """As `ops.coefficient_grad`: <grad_weight, tau_k>, [K]."""
        ...


class Stored(Deltas):
    """K tensors of one shape and dtype that stand for the task vectors of one weight.

    Args:
        tensors: K tensors [*] of the base's shape and one dtype.

    Attributes:
        tensors: the same, as a tuple.
        experts: True if the tensors are the experts' weights, so that tau_k = tensors_k - base,
            subtracted in registers; False if they are task vectors.
    """

    experts: bool

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tuple(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> Stored:
        """The same format with `function` applied to every tensor."""
        return type(self)([function(t) for t in self.tensors])

    def rows(self, start: int, stop: int) -> Stored:
        return self.map(lambda t: t[start:stop])

    def entry(self, index: int) -> Stored:
        return self.map(lambda t: t[index])

    def gather(self, ids: Tensor) -> Stored:
        return self.map(lambda t: t.index_select(0, ids))

    def flat(self) -> Stored:
        return self.map(lambda t: t.flatten(1))

    def task_vectors(self, base: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        for tensor in self.tensors:
            yield as_task_vector(base, tensor, self.experts, dtype)
