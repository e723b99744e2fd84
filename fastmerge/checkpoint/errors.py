"""The error of everything that is wrong with a checkpoint on disk."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: names file, tensor, expected and found."""
