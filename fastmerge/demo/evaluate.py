"""Accuracy of an encoder on labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .tasks import Split

_BATCH = 64


@torch.no_grad()
def embed(encoder: nn.Module, ids: Tensor) -> Tensor:
    """Embeddings [rows, width] of token ids [rows, tokens] int64.

    Rows run in order of length, each batch cut to its longest row: the same values up to rounding,
    for less work than full padding.
    """
    lengths = (ids != 0).sum(1)  # [rows]
    order = torch.argsort(lengths, stable=True)
    parts = [encoder(ids[rows][:, : int(lengths[rows].max())]) for rows in order.split(_BATCH)]
    return torch.cat(parts)[torch.argsort(order)]


def accuracy(encoder: nn.Module, head: Callable[[Tensor], Tensor], rows: Split) -> float:
    """Percentage of rows whose highest logit is the label's."""
    predicted = head(embed(encoder, rows.ids)).argmax(-1)  # [rows]
    return 100.0 * float((predicted == rows.labels).double().mean())


def accuracies(
    encoder: nn.Module,
    heads: Mapping[str, Callable[[Tensor], Tensor]],
    splits: Mapping[str, Split],
) -> dict[str, float]:
    """Accuracy in percent on every task's rows."""
    return {name: accuracy(encoder, heads[name], rows) for name, rows in splits.items()}
