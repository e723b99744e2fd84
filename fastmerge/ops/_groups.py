"""Rows of activations grouped by equal row coefficients, so that each group shares one weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._library import check, check_float


@dataclass(frozen=True)
class Groups:
    """R rows of activations in G groups, each with one row of coefficients.

    Attributes:
        coefficients: [G, K]; equal for no two groups unless equal rows were kept apart.
        sizes: rows of each group, all positive.
        order: int64 [R], the rows group by group, each group's in their order; None if that is
            the order they have.
    """

    coefficients: Tensor
    sizes: list[int]
    order: Tensor | None

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [R, C] group by group; the same tensor if they lie so."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def scatter(self, rows: Tensor) -> Tensor:
        """The inverse of `gather`."""
        if self.order is None:
            return rows
        return torch.empty_like(rows).index_copy_(0, self.order, rows)

    def spans(self) -> list[tuple[int, int]]:
        """Start and stop of each group among the gathered rows."""
        stops = torch.tensor(self.sizes, dtype=torch.int64).cumsum(0).tolist()
        return [(stop - size, stop) for size, stop in zip(self.sizes, stops, strict=True)]


def check_row_coefficients(
    op: str, coefficients: Tensor, lead: Sequence[int], count: int, device: torch.device
) -> None:
    """Coefficients [K], or row coefficients [..., K] that broadcast to the activations' rows.

    Args:
        op: for the message.
        coefficients: what is checked.
        lead: leading dimensions of the activations.
        count: K.
        device: where they must be.

    Raises:
        RuntimeError: shape, dtype or device do not fit.
    """
    check_float(op, "coefficients", coefficients)
    *own, last = coefficients.shape if coefficients.dim() else (-1,)
    against = lead[len(lead) - len(own) :]
    fits = len(own) <= len(lead) and all(a in (1, b) for a, b in zip(own, against, strict=True))
    check(
        last == count and fits and coefficients.device == device,
        lambda: (
            f"{op}: coefficients is {list(coefficients.shape)} on {coefficients.device}, "
            f"expected [{count}] or {[*lead, count]} or what broadcasts to it on {device}"
        ),
    )


def row_indices(coefficients: Tensor, lead: Sequence[int]) -> Tensor:
    """Which row of coefficients each row of activations has: int64 [R].

    Args:
        coefficients: [..., K], S rows; broadcasts to [*lead, K].
        lead: leading dimensions of the activations, R rows.
    """
    own = coefficients.shape[:-1]
    indices = torch.arange(math.prod(own), device=coefficients.device).view(own)
    return indices.expand(lead).reshape(-1)


def group_rows(coefficients: Tensor, lead: Sequence[int], *, join_equal: bool = True) -> Groups:
    """Group rows of activations by their row of coefficients, in order of first appearance.

    Args:
        coefficients: [..., K]; broadcasts to [*lead, K].
        lead: leading dimensions of the activations, R rows.
        join_equal: whether equal rows of coefficients make one group; False gives S groups, where
            R is not 0, in the order of the rows of coefficients, for gradients of each.
    """
    rows = coefficients.detach().reshape(-1, coefficients.shape[-1])  # [S, K]
    if math.prod(lead) == 0:
        return Groups(rows[:0], [], None)
    of_row = row_indices(coefficients, lead)
    if join_equal:
        groups: dict[tuple[float, ...], int] = {}
        joined, first = [], []
        for index, row in enumerate(rows.tolist()):
            group = groups.setdefault(tuple(row), len(groups))
            joined.append(group)
            if group == len(first):
                first.append(index)
        rows = rows[torch.tensor(first, device=rows.device)]
        of_row = torch.tensor(joined, device=of_row.device)[of_row]
    sizes = torch.bincount(of_row, minlength=len(rows)).tolist()
    in_order = bool((of_row[1:] >= of_row[:-1]).all())
    return Groups(rows, sizes, None if in_order else torch.argsort(of_row, stable=True))
