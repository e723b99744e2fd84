"""The processes that share a job: one, or those that torchrun started."""

from __future__ import annotations

import heapq
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..checkpoint import CheckpointError

# How long a rank waits for the others' share of the work. One that dies closes its connections,
# which ends all of them at once; the limit is for networks that swallow that.
PATIENCE = timedelta(hours=24)


class Ranks:
    """This process among those of the job.

    What they tell each other are statistics and errors, which are small and on the CPU: gloo
    carries them, whatever device the blocks are computed on.

    Attributes:
        rank: this process's number.
        size: how many there are.

    Raises:
        CheckpointError: the other processes cannot be reached.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._group, self._owned = 0, 1, None, False
        if not dist.is_available():
            return
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                dist.init_process_group("gloo")
            except RuntimeError as error:
                raise CheckpointError(
                    f"the job's processes do not find each other: {error}"
                ) from error
            self._owned = True
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks.

        Raises:
            CheckpointError: a process is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise CheckpointError(
                f"rank {self.rank}: another process of this job is gone ({error})"
            ) from error
        return values

    def agree(self, error: BaseException | None = None) -> None:
        """Wait for all processes; raise in all of them if one of them failed.

        Raises:
            the error itself where it happened; elsewhere ValueError if it was about the data, else
            CheckpointError.
        """
        data = isinstance(error, ValueError) and not isinstance(error, CheckpointError)
        found = self.gather(None if error is None else (data, f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, failure in enumerate(found):
            if failure is not None:
                kind = ValueError if failure[0] else CheckpointError
                raise kind(f"rank {rank} failed: {failure[1]}")

    def owners(self, costs: Sequence[int]) -> list[int]:
        """The rank that does each piece of work, so that all have about the same to do."""
        heap = [(0, rank) for rank in range(self.size)]
        owner = [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
            load, rank = heapq.heappop(heap)
            owner[index] = rank
            heapq.heappush(heap, (load + costs[index], rank))
        return owner

    def close(self) -> None:
        """Leave, if this object joined."""
        if self._owned:
            dist.destroy_process_group()
