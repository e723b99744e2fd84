"""Checkpoints on disk for tests, honest and hostile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_folder(folder: Path, *shards: Mapping[str, Tensor], index: bool | None = None) -> Path:
    """A checkpoint folder: `model.safetensors`, or shards with an index unless it is False."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1 and not index:
        save_file(dict(shards[0]), folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(shard), folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    if index is not False:
        write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """The folder's index file."""
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)})
    (folder / "model.safetensors.index.json").write_text(text)


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header: an object to be put into JSON, or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    """One tensor's entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def dense(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)
