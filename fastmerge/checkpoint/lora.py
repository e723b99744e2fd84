"""A LoRA adapter in PEFT's format as an expert: base + scaling * B A, a block of rows at a time."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .header import MAX_HEADER_BYTES, parse_json
from .index import PICKLES, check_inside
from .reader import Checkpoint, Entry

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(\.(?!weight$)[^.]+)?(\.weight)?"
)
# PEFT takes the patterns of rank_pattern and alpha_pattern as regular expressions. A hostile one
# can run for ever, so only names with few repeated single characters are accepted.
PATTERN = re.compile(r"\^?((\w|-|\\?\.|\\d)[*+]?)*\$?")
MAX_REPEATS = 3
# Settings that make an adapter something else than base + scaling * B A, with the values that do
# not.
PLAIN = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "alora_invocation_tokens": ([], None),
    "use_qalora": (False, None),
    "arrow_config": (None,),
    "megatron_config": (None,),
}
# These initializations change the base model, so that the adapter belongs to another base.
OTHER_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class _Factors:
    """The adapter of one weight; `transposed` if the weight is (B A)^T."""

    a: str
    b: str
    scaling: float
    transposed: bool


class LoraCheckpoint:
    """A base model with a LoRA adapter on it, with the interface of `Checkpoint`.

    Adapted weights read as base + s B A in fp32 (fp64 if the base is), s = lora_alpha / r, or
    lora_alpha / sqrt(r) with `use_rslora`; B A is formed for the rows that are read and nothing
    else. Tensors of `modules_to_save` are the adapter's. All others are the base's.

    Args:
        base: the checkpoint that the adapter was trained on.
        folder: `adapter_config.json` and `adapter_model.safetensors`.
        name: name in messages, by default the folder's.

    Raises:
        CheckpointError: not such a folder, a kind of adapter that is not a LoRA, or factors that
            fit no tensor of the base.

    Source: LoRA (arXiv 2106.09685); rsLoRA (arXiv 2312.03732).
    """

    def __init__(self, base: Checkpoint, folder: str | Path, name: str | None = None):
        self.base, self.folder = base, Path(folder)
        self.name = self.folder.name if name is None else name
        self._config, self._config_hash = _read_config(self.folder)
        self._adapter = _open_weights(self.folder, self.name)
        self._saved: dict[str, str] = {}  # {key in base: tensor of modules_to_save}
        self._factors = self._match()
        self.metadata = base.metadata
        self.unlisted: tuple[str, ...] = ()
        self.tensors: dict[str, Entry] = {
            key: self._changed(key, entry) for key, entry in base.tensors.items()
        }

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor along its first dimension, all of them by default."""
        if key in self._saved:
            return self._adapter.read(self._saved[key], start, stop)
        rows = self.base.read(key, start, stop)
        if key not in self._factors:
            return rows
        return self._adapt(key, rows, slice(start, start + len(rows)))

    def read_rows(self, key: str, rows: Tensor) -> Tensor:
        """Copies of the rows of these numbers, int64 [n], of a tensor that has entries."""
        if key in self._saved:
            return self._adapter.read_rows(self._saved[key], rows)
        stored = self.base.read_rows(key, rows)
        return self._adapt(key, stored, rows) if key in self._factors else stored

    def reading_bytes(self, key: str, rows: int) -> int:
        """Memory that reading so many rows takes besides the result: factors and a copy in fp32."""
        if key not in self._factors:
            return 0
        entry, factors = self.tensors[key], self._factors[key]
        rank = self._adapter.tensors[factors.a].shape[0]
        row = math.prod(entry.shape[1:])
        return ((rows + row) * rank + rows * row) * entry.dtype.itemsize

    @property
    def changed(self) -> list[str]:
        """Tensors of the base that the adapter changes or replaces."""
        return [key for key in self.base.tensors if key in self._factors or key in self._saved]

    def factors(self, key: str) -> tuple[Tensor, Tensor] | None:
        """down [r, *] and up [O, r] with up down = s B A as the base stores it, fp32 or fp64.

        None for a tensor that the adapter replaces or leaves as it is.
        """
        found = self.stored_factors(key)
        if found is None:
            return None
        a, b, scaling, transposed = found
        up, down = (a.t(), b.t()) if transposed else (b, a)
        return down.reshape(-1, *self.base.tensors[key].shape[1:]), up * scaling

    def stored_factors(self, key: str) -> tuple[Tensor, Tensor, float, bool] | None:
        """A [r, *] and B [O, r] in fp32 or fp64, s, and whether the base stores (B A)^T, or None.

        Dimensions after the second are flattened.
        """
        found = self._factors.get(key)
        if found is None:
            return None
        dtype = _computed_in(self.base.tensors[key].dtype)
        a, b = (self._adapter.read(f).flatten(1).to(dtype) for f in (found.a, found.b))
        return a, b, found.scaling, found.transposed

    def _adapt(self, key: str, stored: Tensor, which: slice | Tensor) -> Tensor:
        """Rows of the base with s B A added, in fp32; no more of it is formed."""
        factors, dtype = self._factors[key], _computed_in(stored.dtype)
        a, b = (self._adapter.read(f).flatten(1) for f in (factors.a, factors.b))
        # A and B^T change places where the stored weight is the transposed product.
        left, right = (a[:, which].T, b.T) if factors.transposed else (b[which], a)
        delta = left.to(stored.device, dtype) @ right.to(stored.device, dtype)
        return delta.view(stored.shape).mul_(factors.scaling).add_(stored.to(dtype))

    def prefetch(self, key: str, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read rows of the base ahead, without waiting for them."""
        self.base.prefetch(key, start, stop)

    def release(self, key: str, start: int = 0, stop: int | None = None) -> None:
        """Give up the process's hold on the memory of rows that are not needed any more."""
        self.base.release(key, start, stop)

    def hash(self) -> str:
        """sha256 over the hashes of base and adapter and the adapter's configuration."""
        parts = (self.base.hash(), self._adapter.hash(), self._config_hash)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def close(self) -> None:
        """Close the adapter; the base stays open."""
        self._adapter.close()

    def __enter__(self) -> LoraCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _match(self) -> dict[str, _Factors]:
        """{key in base: factors}, every tensor of the adapter accounted for."""
        pairs: dict[tuple[str, str], dict[str, str]] = {}
        for key in self._adapter.tensors:
            match = FACTOR.fullmatch(key)
            if match is None and self._is_saved(key):
                continue
            if match is None:
                raise CheckpointError(
                    f"{self._where(key)}: not a factor of a LoRA; such adapters are not supported"
                )
            pair = pairs.setdefault((match["module"], match["kind"] or ""), {})
            if match["factor"] in pair:
                raise CheckpointError(
                    f"{self._where(key)}: {pair[match['factor']]!r} is the same factor"
                )
            pair[match["factor"]] = key
        return dict(self._pair(module, kind, pair) for (module, kind), pair in pairs.items())

    def _is_saved(self, key: str) -> bool:
        """Whether a tensor is one of `modules_to_save`, which takes the base's place."""
        name = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.)", "", key.removeprefix(PREFIX))
        modules = self._config.get("modules_to_save") or []
        if not any(module in name.split(".")[:-1] for module in modules):
            return False
        if name not in self.base.tensors:
            raise CheckpointError(
                f"{self._where(key)}: {self.base.name} has no tensor {name!r} to replace"
            )
        found, expected = self._adapter.tensors[key].shape, self.base.tensors[name].shape
        if found != expected:
            raise CheckpointError(
                f"{self._where(key)} has shape {list(found)}, expected {list(expected)} as "
                f"{name!r} of {self.base.name}"
            )
        self._saved[name] = key
        return True

    def _pair(self, module: str, kind: str, pair: Mapping[str, str]) -> tuple[str, _Factors]:
        if len(pair) != 2:
            found = next(iter(pair.values()))
            raise CheckpointError(f"{self._where(found)}: the other factor is missing")
        a, b = pair["A"], pair["B"]
        name = module.removeprefix(PREFIX)
        key = name + ".weight"
        if key not in self.base.tensors:
            near = difflib.get_close_matches(key, self.base.tensors, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise CheckpointError(
                f"{self._where(a)}: {self.base.name} has no tensor {key!r} to adapt{hint}"
            )
        rank, scaling = self._scaling(name)
        transposed = bool(kind) or bool(self._config.get("fan_in_fan_out"))
        self._check_shapes(a, b, key, rank, transposed)
        return key, _Factors(a, b, scaling, transposed)

    def _scaling(self, module: str) -> tuple[int, float]:
        rank = _of_pattern(self._config.get("rank_pattern"), module, self._config["r"])
        alpha = _of_pattern(self._config.get("alpha_pattern"), module, self._config["lora_alpha"])
        root = math.sqrt(rank) if self._config.get("use_rslora") else rank
        return rank, alpha / root

    def _check_shapes(self, a: str, b: str, key: str, rank: int, transposed: bool) -> None:
        shape_a, shape_b = (self._adapter.tensors[factor].shape for factor in (a, b))
        shape = self.base.tensors[key].shape
        if len(shape) < 2:
            raise CheckpointError(
                f"{self._where(a)}: {key!r} of {self.base.name} has shape {list(shape)}, expected "
                "a matrix"
            )
        outer = shape[::-1] if transposed else shape
        expected_a, expected_b = (rank, *outer[1:]), (outer[0], rank, *[1] * (len(shape) - 2))
        for factor, found, expected in ((a, shape_a, expected_a), (b, shape_b, expected_b)):
            if found != expected:
                raise CheckpointError(
                    f"{self._where(factor)} has shape {list(found)}, expected {list(expected)} for "
                    f"{key!r} of shape {list(shape)} and rank {rank}"
                )

    def _changed(self, key: str, entry: Entry) -> Entry:
        if key in self._saved:
            dtype = self._adapter.tensors[self._saved[key]].dtype
            return replace(entry, dtype=dtype, stored=entry.file_dtype)
        if key in self._factors:
            return replace(entry, dtype=_computed_in(entry.dtype), stored=entry.file_dtype)
        return entry

    def _where(self, key: str) -> str:
        return f"{self.folder / WEIGHTS}: tensor {key!r}"


def is_adapter(path: str | Path) -> bool:
    """Whether a path is a folder with a PEFT adapter."""
    return (Path(path) / CONFIG).is_file()


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected an adapter in PEFT's format")
    check_inside(folder, CONFIG)
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, too long for a configuration")
    text = path.read_bytes()
    config = parse_json(text, str(path))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}, only 'LORA' is supported")
    for setting, plain in PLAIN.items():
        if setting in config and config[setting] not in plain:
            raise CheckpointError(
                f"{path}: {setting} is {config[setting]!r}; such adapters are not supported, "
                "merge it into its base model with PEFT first"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(OTHER_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {init!r}, which changes the base model; convert the "
            "adapter with PEFT first"
        )
    modules = config.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise CheckpointError(f"{path}: modules_to_save must be a list of module names")
    for setting, least in (("r", 1), ("lora_alpha", 0)):
        value = config.get(setting)
        _check_number(path, setting, value, least)
    for setting, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
        patterns = config.get(setting) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {setting} must map module names to numbers")
        for pattern, value in patterns.items():
            _check_number(path, setting, value, least)
            if not PATTERN.fullmatch(pattern) or sum(map(pattern.count, "*+")) > MAX_REPEATS:
                raise CheckpointError(
                    f"{path}: {setting} has the pattern {pattern!r}, expected a module's name or "
                    "its end; write the modules out"
                )
    return config, hashlib.sha256(text).hexdigest()


def _check_number(path: Path, setting: str, value: Any, least: int) -> None:
    kinds = (int,) if least else (int, float)
    if type(value) not in kinds or not math.isfinite(value) or value < least:
        raise CheckpointError(f"{path}: {setting} is {value!r}, expected a number >= {least}")


def _open_weights(folder: Path, name: str) -> Checkpoint:
    path = folder / WEIGHTS
    if not path.exists():
        for pickle in folder.glob("adapter_model.*"):
            if pickle.suffix in PICKLES:
                return Checkpoint.open(pickle)  # which refuses it, and says what to do
        raise CheckpointError(f"{path}: no such file")
    check_inside(folder, WEIGHTS)
    return Checkpoint.open(path, name)


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name or its end, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
