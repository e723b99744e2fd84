"""A checkpoint whose vocabulary tensors are read in another tokenizer's order of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Entry
from .vocabulary import Alignment


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
        rows = len(alignment.own)
        self.tensors: dict[str, Entry] = {
            key: replace(entry, shape=(rows, *entry.shape[1:])) if key in keys else entry
            for key, entry in inner.tensors.items()
        }

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor along its first dimension, all of them by default."""
        if key not in self.keys:
            return self.inner.read(key, start, stop)
        own = self.alignment.own[start:stop]
        rows = self.inner.read(key)[own.clamp(min=0)]
        lacking = (own < 0).nonzero().flatten()
        if len(lacking):
            rows[lacking] = self._others(key, start, stop, lacking).to(rows.dtype)
        return rows

    def _others(self, key: str, start: int, stop: int | None, rows: Tensor) -> Tensor:
        """Means over the other models that have these rows, in fp32 (fp64 for fp64)."""
        entry = self.tensors[key]
        dtype = torch.float64 if entry.dtype == torch.float64 else torch.float32
        total = torch.zeros(len(rows), *entry.shape[1:], dtype=dtype)
        count = torch.zeros(len(rows), dtype=dtype)
        for model, index in self.alignment.others:
            chosen = index[start:stop][rows]
            have = chosen >= 0
            if bool(have.any()):
                stored = self.models[model].read(self.keys[key][model])
                total[have] += stored[chosen[have]].to(dtype)
                count += have
        return total / count.clamp(min=1).view(-1, *[1] * (total.dim() - 1))

    def prefetch(self, key: str, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read rows ahead; rows in another order come when they are read."""
        if key not in self.keys:
            self.inner.prefetch(key, start, stop)

    def release(self, key: str, start: int = 0, stop: int | None = None) -> None:
        """Give up the process's hold on the memory of rows that are not needed any more."""
        if key not in self.keys:
            self.inner.release(key, start, stop)

    def hash(self) -> str:
        """sha256 over the checkpoint's hash and the order of its rows."""
        total = hashlib.sha256(self.inner.hash().encode())
        for name, index in (("", self.alignment.own), *self.alignment.others):
            total.update(f"\0{name}\0".encode() + index.numpy().tobytes())
        return total.hexdigest()

    def close(self) -> None:
        """Close the stored checkpoint."""
        self.inner.close()
