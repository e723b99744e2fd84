"""Safetensors checkpoints and PEFT adapters: checked headers, rows of tensors without copies."""

from __future__ import annotations

from .errors import CheckpointError
from .lora import LoraCheckpoint
from .mapped import DTYPE_NAMES, DTYPES
from .reader import Checkpoint, Entry

__all__ = ["DTYPES", "DTYPE_NAMES", "Checkpoint", "CheckpointError", "Entry", "LoraCheckpoint"]
