"""Strict reading and writing of safetensors headers; no tensor data is touched here.

A safetensors file is 8 bytes of header length (little-endian), a JSON object, then the tensors'
bytes. The object maps each tensor's name to its dtype, shape and [start, stop) in those bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_DIMENSIONS = 64  # torch's own limit is near; real tensors have at most a handful
MAX_OFFSET = 2**63 - 1
MAX_DIGITS = 20  # of an integer in the header: more cannot be a size
LENGTH_BYTES = 8

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies in a file.

    Attributes:
        dtype: safetensors' name of the dtype, a key of `ITEM_SIZES`.
        shape: its shape.
        start, stop: bytes from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: {name: extent}, in the order of the bytes.
        metadata: the header's `__metadata__`.
    """

    tensors: Mapping[str, Extent]
    metadata: Mapping[str, str]


def header_length(prefix: bytes, size: int, file: str) -> int:
    """Length of the JSON text.

    Args:
        prefix: the first 8 bytes of the file.
        size: the file's size.
        file: its name in messages.

    Raises:
        CheckpointError: too short, or a length that cannot be.
    """
    if size < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise CheckpointError(
            f"{file}: {size} bytes, too short for a safetensors file; is it a truncated download?"
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: header of {length} bytes, at most {MAX_HEADER_BYTES} expected; "
            "this is no safetensors file"
        )
    if length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{file}: header of {length} bytes, but only {size - LENGTH_BYTES} bytes follow; "
            "the file is truncated"
        )
    return length


def parse_header(text: bytes, size: int, file: str) -> Header:
    """Check a header completely.

    Args:
        text: the JSON text.
        size: the file's size.
        file: its name in messages.

    Raises:
        CheckpointError: anything that does not fit, named.
    """
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file}: the header does not begin with '{{'")
    entries = parse_json(text, file)
    metadata = _metadata(entries.pop("__metadata__", {}), file)
    begin = LENGTH_BYTES + len(text)
    extents = {name: _extent(name, entry, begin, file) for name, entry in entries.items()}
    ordered = sorted(extents.items(), key=lambda item: (item[1].start, item[1].stop))
    expected, previous = begin, None
    for name, extent in ordered:
        if extent.start != expected:
            kind = "overlaps" if extent.start < expected else "leaves a gap after"
            raise CheckpointError(
                f"{file}: tensor {name!r} starts at byte {extent.start - begin}, expected "
                f"{expected - begin}: it {kind} {repr(previous) if previous else 'the header'}"
            )
        expected, previous = extent.stop, name
    if expected != size:
        fault = "the file is truncated" if expected > size else "there is something behind it"
        raise CheckpointError(
            f"{file}: the last tensor ends at byte {expected}, the file at {size}: {fault}"
        )
    return Header(dict(ordered), metadata)


def parse_json(text: bytes, file: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN, or numbers too long to be sizes.

    Raises:
        CheckpointError: not such an object.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise CheckpointError(f"{file}: the JSON text is nested too deeply") from None
    except ValueError as error:  # errors of Unicode and JSON are ValueErrors
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    "".join(found).encode()  # half a surrogate pair is valid in JSON, but in no file or message
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} is there twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings")
    return value


def _extent(name: str, entry: Any, begin: int, file: str) -> Extent:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{where} has dtype {dtype!r}, expected one of {', '.join(ITEM_SIZES)}"
        )
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: shape {_short(shape)} is no list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has {len(shape)} dimensions, at most {MAX_DIMENSIONS}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {_short(offsets)}, expected [start, stop]")
    needed = math.prod(shape) * ITEM_SIZES[dtype]
    largest = math.prod(max(size, 1) for size in shape) * ITEM_SIZES[dtype]
    if largest > MAX_OFFSET or begin + offsets[1] > MAX_OFFSET:
        raise CheckpointError(f"{where}: shape {_short(shape)} does not fit 64 bits")
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{where}: {dtype} {_short(shape)} needs {needed} bytes, "
            f"data_offsets hold {offsets[1] - offsets[0]}"
        )
    return Extent(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= MAX_OFFSET for value in values
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def format_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Extent]]:
    """The beginning of a file that holds these tensors one after the other, and their extents.

    The JSON text is padded with spaces so that the tensors start at a multiple of 8 bytes. Give
    tensors of wider dtypes first and each is aligned to its own size.

    Args:
        tensors: (name, safetensors dtype, shape) in the order of the bytes.
        metadata: the header's `__metadata__`.
    """
    offset, entries = 0, {"__metadata__": dict(metadata)} if metadata else {}
    for name, dtype, shape in tensors:
        stop = offset + math.prod(shape) * ITEM_SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    begin = LENGTH_BYTES + len(text)
    extents = {
        name: Extent(dtype, tuple(shape), *(begin + o for o in entries[name]["data_offsets"]))
        for name, dtype, shape in tensors
    }
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, extents
