"""What serving all tasks at once takes: memory for the weights, time for a batch of mixed tasks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..merged_functions import is_merged
from .tasks import Split

_ROUNDS = 9


@dataclass(frozen=True)
class MixedBatch:
    """Rows of all tasks in turn, so that neighbours belong to different tasks.

    Attributes:
        ids: token ids [B, tokens] int64.
        tasks: the task of each row.
    """

    ids: Tensor
    tasks: list[str]

    @classmethod
    def of(cls, rows: Mapping[str, Split], rows_a_task: int) -> MixedBatch:
        """The first rows of every task."""
        count = min(rows_a_task, *(len(split.ids) for split in rows.values()))
        ids = torch.stack([split.ids[:count] for split in rows.values()], dim=1)  # [rows, tasks, T]
        return cls(ids.flatten(0, 1), list(rows) * count)

    def of_task(self, task: str) -> Tensor:
        """The rows of one task."""
        return self.ids[[index for index, name in enumerate(self.tasks) if name == task]]


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a run, after two that warm up."""
    seconds = []
    with torch.no_grad():
        for number in range(_ROUNDS + 2):
            begun = time.perf_counter()
            run()
            if number >= 2:
                seconds.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(seconds)


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters; of merged weights, those of base and deltas."""
    parts = {id(p): p for p in model.parameters()}.values()
    return sum(p.base.nbytes + p.deltas.nbytes() if is_merged(p) else p.nbytes for p in parts)


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of these tensors' values."""
    return sum(tensor.nbytes for tensor in tensors.values())
