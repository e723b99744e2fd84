"""A checkpoint whose vocabulary tensors are read in another tokenizer's order of rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Entry
from .vocabulary import ZERO, Alignment

MEAN_ENTRIES = 1 << 20  # added up at a time: for the same sum on any machine, in little memory
GATHER_COPIES = 3  # what rows that others have in place of a model take besides the rows


class AlignedCheckpoint:
    """A checkpoint with the interface of `Checkpoint`, rows of some tensors taken from elsewhere.

    Args:
        inner: the checkpoint as stored.
        keys: {aligned tensor: {model: its name there}}.
        alignment: which rows to take.
        models: {name: checkpoint} of all models of the alignment.
    """

    def __init__(
        self,
        inner: Checkpoint,
        keys: Mapping[str, Mapping[str, str]],
        alignment: Alignment,
        models: Mapping[str, Checkpoint],
    ):
        self.inner, self.keys, self.alignment, self.models = inner, keys, alignment, models
        self.name, self.folder, self.metadata = inner.name, inner.folder, inner.metadata
        self.unlisted = inner.unlisted
        self._means: dict[str, Tensor] = {}
        rows = len(alignment.own)
        self.tensors: dict[str, Entry] = {
            key: replace(entry, shape=(rows, *entry.shape[1:])) if key in keys else entry
            for key, entry in inner.tensors.items()
        }

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor along its first dimension, all of them by default."""
        if key not in self.keys:
            return self.inner.read(key, start, stop)
        rows, empty = self._gather(key, start, stop)
        if bool(empty.any()):
            rows[empty] = self._mean(key).to(rows.dtype)
        return rows

    def _gather(self, key: str, start: int, stop: int | None) -> tuple[Tensor, Tensor]:
        """Rows [start, stop), and which of them no model has: those are anything yet."""
        own = self.alignment.own[start:stop]
        rows, empty = self.inner.read_rows(key, own.clamp(min=0)), own == -1
        rows[own == ZERO] = 0
        lacking = empty.nonzero().flatten()
        if len(lacking):
            total = torch.zeros(len(lacking), *rows.shape[1:], dtype=_computed_in(rows.dtype))
            count = torch.zeros(len(lacking), dtype=total.dtype)
            for model, index in self.alignment.others:
                chosen = index[start:stop][lacking]
                have = chosen >= 0
                if bool(have.any()):
                    stored = self.models[model].read_rows(self.keys[key][model], chosen[have])
                    total[have] += stored.to(total.dtype)
                    count += have
            means = total / count.clamp(min=1).view(-1, *[1] * (total.dim() - 1))
            rows[lacking] = means.to(rows.dtype)
            empty[lacking] = count == 0
        return rows, empty

    def _mean(self, key: str) -> Tensor:
        """Mean of the rows that some model has, which is what the others become."""
        if key not in self._means:
            shape = self.tensors[key].shape[1:]
            total, count = torch.zeros(shape, dtype=torch.float64), 0
            step = _mean_rows(shape)
            for start in range(0, len(self.alignment.own), step):
                rows, empty = self._gather(key, start, start + step)
                total += rows[~empty].sum(0, dtype=torch.float64)
                count += len(rows) - int(empty.sum())
            self._means[key] = total / max(count, 1)
        return self._means[key]

    def read_rows(self, key: str, rows: Tensor) -> Tensor:
        """Copies of the rows of these numbers, int64 [n], of a tensor that is not aligned."""
        return self.inner.read_rows(key, rows)

    def reading_bytes(self, key: str, rows: int) -> int:
        """Memory that reading so many rows takes besides the rows themselves."""
        if key not in self.keys:
            return self.inner.reading_bytes(key, rows)
        entry = self.tensors[key]
        rows = max(rows, _mean_rows(entry.shape[1:]))
        given = [self.inner.reading_bytes(key, rows)]
        for name, _ in self.alignment.others:
            given.append(self.models[name].reading_bytes(self.keys[key][name], rows))
        wide = _computed_in(entry.dtype).itemsize
        return max(given) + GATHER_COPIES * rows * math.prod(entry.shape[1:]) * wide

    def prefetch(self, key: str, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read rows ahead; rows in another order come when they are read."""
        if key not in self.keys:
            self.inner.prefetch(key, start, stop)

    def release(self, key: str, start: int = 0, stop: int | None = None) -> None:
        """Give up the process's hold on the memory of rows that are not needed any more."""
        if key not in self.keys:
            self.inner.release(key, start, stop)

    def hash(self) -> str:
        """sha256 over the hashes of all checkpoints that give rows, and their order."""
        total = hashlib.sha256(self.inner.hash().encode())
        for name, index in (("", self.alignment.own), *self.alignment.others):
            total.update(f"\0{name}\0".encode() + index.numpy().tobytes())
        for name, _ in self.alignment.others:
            total.update(self.models[name].hash().encode())
        return total.hexdigest()

    def close(self) -> None:
        """Close the stored checkpoint."""
        self.inner.close()


def _mean_rows(shape: Sequence[int]) -> int:
    return max(1, MEAN_ENTRIES // max(math.prod(shape), 1))


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
