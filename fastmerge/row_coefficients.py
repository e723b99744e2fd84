"""`RowCoefficients`: coefficients that differ from sample to sample of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Tables whose looked-up numbers say nothing about samples: T5's and MPNet's relative positions.
SHARED_LOOKUPS = ("relative_attention_bias",)


class RowCoefficients(nn.Module):
    """The coefficients of one batch: a row [K] for every sample, shared by all tensors.

    Merged weights that hold these compute with W_b = base + sum_k lambda_bk tau_k for sample b of
    the batch, without building W_b. They stand in the place of `Coefficients` and are no
    parameters: a task id, a router or anything else says what they are, before the model runs.
    Gradients reach the tensor they were set to. The batch is the first dimension of the model's
    inputs and activations, also where layers flatten [B, T, ..] to [B * T, ..].

    Args:
        names: L unique tensor names.
        experts: K unique expert names.
        shared_lookups: parts of names of embedding tables whose indices have no batch dimension.

    Attributes:
        current: the rows that are set, [B, K], or [K] for all samples alike; None if nothing is.
        batch_second: whether activations are [T, B, ..] now, as within nn.MultiheadAttention.

    Raises:
        ValueError: there is no tensor or no expert, or a name repeats.
    """

    def __init__(
        self,
        names: Sequence[str],
        experts: Sequence[str],
        *,
        shared_lookups: Sequence[str] = SHARED_LOOKUPS,
    ):
        super().__init__()
        self.names, self.experts = list(names), list(experts)
        for what, values in (("tensor", self.names), ("expert", self.experts)):
            if not values:
                raise ValueError(f"row coefficients need at least one {what}, got none")
            if len(set(values)) != len(values):
                raise ValueError(f"{what} names must be unique, got {values}")
        self.shared_lookups = tuple(shared_lookups)
        self.current: Tensor | None = None
        self.batch_second = False
        self._pass = -1

    def set(self, rows: Tensor | None) -> None:
        """Compute with these rows from now on.

        Args:
            rows: [B, K], or [K] for all samples alike; differentiable. None unsets them.

        Raises:
            ValueError: another shape, or not floating point.
        """
        if rows is not None:
            count = len(self.experts)
            if rows.dim() not in (1, 2) or rows.shape[-1] != count or not rows.is_floating_point():
                raise ValueError(
                    f"row coefficients are {rows.dtype} {list(rows.shape)}, expected floating "
                    f"point [B, {count}] or [{count}]"
                )
            if isinstance(rows, nn.Parameter):
                rows = rows.view_as(rows)  # a module would take it for its own
            rows = rows[0] if rows.shape[:-1] == (1,) else rows  # which every function can do
        self.current = rows
        if not torch.compiler.is_compiling():
            self._pass = torch._C._current_graph_task_id()

    @contextlib.contextmanager
    def using(self, rows: Tensor) -> Iterator[None]:
        """Compute with these rows within the context, and with the former ones afterwards."""
        former = self.current
        self.set(rows)
        try:
            yield
        finally:
            self.set(former)

    @property
    def per_sample(self) -> bool:
        """Whether samples have rows of their own."""
        return self.current is not None and self.current.dim() == 2

    def row(self, index: int) -> Tensor:
        """The coefficients of tensor `index`: [B, K], or [K] for all samples alike.

        Raises:
            RuntimeError: none are set, or a backward pass computes a forward pass again and did
                not set them itself.
        """
        if self.current is None:
            raise RuntimeError(
                f"merged weight {self.names[index]!r} is used, but no coefficients are set for the "
                "batch: run the model within `with fastmerge.task(model, ids)`; where activation "
                "checkpointing computes again, do so inside the checkpointed function"
            )
        if not torch.compiler.is_compiling():
            again = torch._C._current_graph_task_id()
            if again not in (-1, self._pass):
                raise RuntimeError(
                    f"merged weight {self.names[index]!r} is computed with again in a backward "
                    "pass, where its batch's coefficients may be others by now: set them inside "
                    "the function that activation checkpointing runs again"
                )
        return self.current

    def spans(self, index: int, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, tensor): all rows of a tensor share their coefficients."""
        return ((0, shape[0] if len(shape) else 1, index),)

    def extra_repr(self) -> str:
        return f"tensors={len(self.names)}, experts={len(self.experts)}"
