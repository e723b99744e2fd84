"""Which files a checkpoint folder consists of, and which tensors each must hold."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError
from .header import MAX_HEADER_BYTES, parse_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class Listing:
    """The files of a checkpoint.

    Attributes:
        files: safetensors files to read, in order.
        weight_map: {tensor: file name} of the index, None without an index.
        unlisted: names of safetensors files of the folder that are not part of the checkpoint.
    """

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None
    unlisted: tuple[str, ...] = ()


def list_files(path: Path) -> Listing:
    """Find a checkpoint's files: a single file, or a folder with or without an index.

    A folder's `model.safetensors` comes before an index, an index before all its safetensors
    files, as in transformers.

    Raises:
        CheckpointError: nothing to read, pickles only, an inconsistent index, or a file that lies
            outside the folder.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(_pickle_message(str(path)))
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if not path.is_dir():
        check_regular(path)
        return Listing((path,), None)
    names = sorted(os.listdir(path))
    shards = [name for name in names if name.endswith(SUFFIX)]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if "model.safetensors" in shards:
        chosen, weight_map = ["model.safetensors"], None
    elif indices:
        index = "model" + INDEX_SUFFIX if "model" + INDEX_SUFFIX in indices else indices[0]
        if len(indices) > 1 and not index.startswith("model."):
            raise CheckpointError(f"{path}: several index files, {', '.join(indices)}; keep one")
        weight_map = read_index(path / index)
        chosen = sorted(set(weight_map.values()))
        absent = [name for name in chosen if name not in shards]
        if absent:
            raise CheckpointError(
                f"{path / index}: names the file {absent[0]!r}, which is not in the folder "
                f"({len(absent)} of {len(chosen)} files are missing)"
            )
    else:
        chosen, weight_map = shards, None
        _check_numbering(path, shards)
    if not chosen:
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise CheckpointError(_pickle_message(str(path / pickles[0])))
        raise CheckpointError(f"{path}: no safetensors file in this folder")
    for name in chosen:
        check_inside(path, name)
    unlisted = tuple(name for name in shards if name not in chosen)
    return Listing(tuple(path / name for name in chosen), weight_map, unlisted)


def read_index(path: Path) -> dict[str, str]:
    """The {tensor: file name} of an index file.

    Raises:
        CheckpointError: not an index, or it names a file outside its folder.
    """
    check_inside(path.parent, path.name)
    size = path.stat().st_size
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: {size} bytes, at most {MAX_HEADER_BYTES} expected")
    return parse_index(path.read_bytes(), str(path))


def parse_index(text: bytes, file: str) -> dict[str, str]:
    """The checked `weight_map` of an index.

    Args:
        text: the JSON text.
        file: its name in messages.

    Raises:
        CheckpointError: not an index, or it names a file outside its folder.
    """
    weight_map = parse_json(text, file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: expected a weight_map from tensors to file names")
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not name.endswith(SUFFIX)
            or name != os.path.basename(name)
            or "\\" in name
            or "\0" in name
        ):
            raise CheckpointError(
                f"{file}: tensor {tensor!r} is said to be in {name!r}, expected the name of a "
                "safetensors file in the same folder"
            )
    return weight_map


def check_inside(folder: Path, name: str) -> None:
    """Refuse a file that a symbolic link leads out of its folder.

    The link into `blobs` of the Hugging Face cache (`snapshots/<revision>/<file>`) is accepted.

    Raises:
        CheckpointError: the file lies elsewhere, or is no regular file.
    """
    root = folder.resolve()
    target = (folder / name).resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if target.parent != root and target.parent != blobs:
        raise CheckpointError(
            f"{folder / name}: a symbolic link to {target}, outside the folder; replace it by the "
            "file"
        )
    check_regular(folder / name)


def check_regular(path: Path) -> None:
    """Raise CheckpointError unless the path is a regular file that exists."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")


def _check_numbering(folder: Path, shards: list[str]) -> None:
    """Without an index, file names that count themselves tell whether one is missing."""
    for name in shards:
        match = SHARD.fullmatch(name)
        if match is None:
            continue
        count = int(match["count"])
        for number in range(1, count + 1):
            expected = f"{match['stem']}-{number:05d}-of-{count:05d}.safetensors"
            if expected not in shards:
                raise CheckpointError(f"{folder}: {name!r} is there, {expected!r} is missing")


def _pickle_message(file: str) -> str:
    return (
        f"{file}: a pickle, which can run any code when it is read; convert it to safetensors "
        "first, if you trust it: for example "
        "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of transformers"
    )
