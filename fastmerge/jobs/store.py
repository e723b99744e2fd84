"""Where a job's finished blocks go: into the output's files, then into the journal."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoint import CheckpointError
from ..checkpoint.layout import Layout
from ..checkpoint.writer import Writer, as_bytes
from .blocks import Cut
from .journal import Digests, Journal
from .plan import Plan

COMMIT_BYTES = 1 << 29  # finished blocks are made safe after so many bytes,
COMMIT_SECONDS = 10.0  # or so much time


class Store:
    """Where finished blocks go: files and journal.

    Args:
        folder: the partial folder.
        layout: its files.
        rank: this process's number.
        verify: keep digests of what was written.
        done: blocks finished by an earlier run.
    """

    def __init__(self, folder: Path, layout: Layout, rank: int, verify: bool, done: Digests):
        self.done = {b: d for b, d in done.items() if d is not None or not verify}
        self._verify, self._writer = verify, Writer(folder, layout, create=False)
        self._journal = Journal(folder, rank)
        self._pending: Digests = {}
        self._bytes, self._since = 0, time.monotonic()
        self._changing, self._committing = threading.Lock(), threading.Lock()

    def write(self, name: str, tensor: int, block: int, row: int, values: torch.Tensor) -> None:
        """Write a block; called from any thread.

        Args:
            name: the tensor's name.
            tensor, block: its number and the block's.
            row: the block's first row.
            values: contiguous CPU tensor.
        """
        self._writer.write(name, row, values)
        digest = _digest(as_bytes(values)) if self._verify else None
        with self._changing:
            self._pending[tensor, block] = digest
            self._bytes += values.nbytes

    def commit_if_due(self) -> None:
        """Make finished blocks safe if there are many, unless another thread is at it."""
        due = self._bytes >= COMMIT_BYTES or time.monotonic() - self._since >= COMMIT_SECONDS
        if due and self._committing.acquire(blocking=False):
            try:
                self.commit()
            finally:
                self._committing.release()

    def commit(self) -> None:
        """Make the finished blocks safe: data first, then the journal that tells of them."""
        with self._changing:
            blocks, self._pending = self._pending, {}
            self._bytes, self._since = 0, time.monotonic()
        self._writer.sync()
        if blocks:
            self._journal.finished(blocks)
            self.done.update(blocks)

    def check(self, plan: Plan, cuts: Sequence[Cut], mine: Sequence[int]) -> None:
        """Read blocks back and compare their digests.

        Args:
            plan, cuts: the job.
            mine: numbers of the tensors to check.

        Raises:
            CheckpointError: names the tensor.
        """
        self._writer.forget()
        for tensor in mine:
            name, cut = plan.outputs[tensor].name, cuts[tensor]
            for block in range(cut.count):
                start, stop = cut.bounds(block)
                found = _digest(self._writer.read(name, start, stop - start))
                if found != self.done[tensor, block]:
                    raise CheckpointError(
                        f"output: tensor {name!r}, rows {start} to {stop}: read back with sha256 "
                        f"{found}, written with {self.done[tensor, block]}"
                    )

    def close(self) -> None:
        """Close files and journal."""
        self._writer.close()
        self._journal.close()


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
