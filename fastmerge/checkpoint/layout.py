"""Where every tensor of an output will lie, known before the first is computed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .errors import CheckpointError
from .header import ITEM_SIZES, MAX_HEADER_BYTES, Extent, format_header
from .mapped import DTYPE_NAMES

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One file of an output.

    Attributes:
        name: the file's name.
        header: its first bytes, up to the first tensor.
        size: its size.
    """

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Layout:
    """All files of an output.

    Attributes:
        shards: the safetensors files.
        places: {tensor: (number of its shard, extent)}.
        index: contents of the index file, None for a single file.
        others: bytes of the small files beside them.
    """

    shards: tuple[Shard, ...]
    places: Mapping[str, tuple[int, Extent]]
    index: bytes | None
    others: int = 0

    @property
    def size(self) -> int:
        """Bytes of all files."""
        weights = sum(shard.size for shard in self.shards)
        return weights + len(self.index or b"") + self.others


def make_layout(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    shard_bytes: int,
) -> Layout:
    """Lay tensors out in files named as Hugging Face's libraries name them.

    Shards are filled in the given order; within a file, tensors of wider dtypes come first, so that
    each is aligned to its own size.

    Args:
        tensors: (name, dtype, shape).
        metadata: `__metadata__` of every file.
        shard_bytes: largest size of a file's tensors; a larger tensor gets a file of its own.

    Raises:
        CheckpointError: a dtype that safetensors does not have, or a name given twice.
    """
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled, total, seen = 0, 0, set()
    for name, dtype, shape in tensors:
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"output: tensor {name!r} has dtype {dtype}, which no file holds")
        if name in seen or name == "__metadata__":
            raise CheckpointError(f"output: the tensor name {name!r} cannot be used twice")
        seen.add(name)
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, DTYPE_NAMES[dtype], tuple(shape)))
        filled += size
        total += size
    shards, places, weight_map = [], {}, {}
    for number, group in enumerate(groups):
        group.sort(key=lambda tensor: -ITEM_SIZES[tensor[1]])
        header, extents = format_header(group, metadata)
        if len(header) > MAX_HEADER_BYTES:
            raise CheckpointError(f"output: the header of file {number + 1} is too long")
        file = (
            f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            if len(groups) > 1
            else "model.safetensors"
        )
        size = max((extent.stop for extent in extents.values()), default=len(header))
        shards.append(Shard(file, header, size))
        places.update({name: (number, extent) for name, extent in extents.items()})
        weight_map.update(dict.fromkeys(extents, file))
    index = None
    if len(shards) > 1:
        contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index = (json.dumps(contents, indent=2, ensure_ascii=False) + "\n").encode()
    return Layout(tuple(shards), places, index)
