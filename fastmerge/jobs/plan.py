"""What a merge job will do, tensor by tensor, known from headers before any data is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..methods import Method


@dataclass(frozen=True)
class Source:
    """One stored tensor.

    Attributes:
        checkpoint: name in `Plan.checkpoints`.
        key: the tensor's key there.
    """

    checkpoint: str
    key: str


@dataclass(frozen=True)
class Output:
    """One tensor to be written.

    Attributes:
        name: its key in the output.
        shape: its shape, which all sources share.
        dtype: its stored dtype.
        method: how it is made; None copies the only expert. Outputs that were given equal
            parameters share one object, and statistics of scope "model" are taken over the
            outputs that share it.
        base: the base model's tensor, None for methods that need none.
        experts: the K experts' tensors, in order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    method: Method | None
    base: Source | None
    experts: tuple[Source, ...]


@dataclass(frozen=True)
class Plan:
    """A whole job.

    Attributes:
        outputs: in the order they are stored.
        checkpoints: opened inputs; their headers were checked.
        metadata: the `__metadata__` of the output's safetensors files.
        texts: {file name: contents} of other files to write: configuration, tokenizer, model card.
        shard_bytes: largest size of one output file.
        seed: the job's seed, for methods that draw random numbers.
        folders: folders and files that were read besides the checkpoints' own; the output must not
            replace them.
    """

    outputs: tuple[Output, ...]
    checkpoints: Mapping[str, Checkpoint]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    texts: Mapping[str, bytes] = field(default_factory=dict)
    shard_bytes: int = 5_000_000_000
    seed: int = 0
    folders: tuple[Path, ...] = ()
