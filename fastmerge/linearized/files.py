"""Linearised adapters as folders in PEFT's format, which everything that reads LoRAs reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint import CheckpointError, LoraCheckpoint
from ..checkpoint.header import parse_json
from ..checkpoint.lora import CONFIG, PREFIX, WEIGHTS, is_adapter
from ..checkpoint.writer import new_folder, write_text
from ..sources import LoadedModel, read_tensors

FORMAT = "fastmerge linearized lora 1"


class Factors(NamedTuple):
    """A LoRA's factors: A [r, I], B [O, r] (None for 0), s, and whether the weight is (B A)^T."""

    down: Tensor
    up: Tensor | None
    scaling: float
    transposed: bool = False


def read_start(model: nn.Module, folder: str | PathLike) -> dict[str, Factors]:
    """{module name: factors} of a LoRA in PEFT's format that belongs to a model.

    Raises:
        CheckpointError: not such a folder, or it does not fit the model.
        ValueError: it also replaces whole tensors.
    """
    if not is_adapter(folder):
        raise CheckpointError(f"start: {str(folder)!r} is no adapter folder in PEFT's format")
    found = {}
    with LoraCheckpoint(LoadedModel(read_tensors(model, "model")), folder) as checkpoint:
        for key in checkpoint.changed:
            factors = checkpoint.stored_factors(key)
            if factors is None:
                raise ValueError(f"start: {folder} replaces {key!r} whole, expected factors alone")
            found[key.removesuffix(".weight")] = Factors(*(_own(part) for part in factors))
    return found


def _own(part):
    """Tensors that do not depend on the file."""
    return part.clone().contiguous() if isinstance(part, Tensor) else part


def write_adapter(folder: Path, factors: Mapping[str, Factors], overwrite: bool) -> Path:
    """Write factors as a LoRA in PEFT's format; the folder appears complete or not at all.

    Raises:
        FileExistsError: something is there already.
        ValueError: layers of both orders of weights, which PEFT's format cannot tell apart.
    """
    orders = {f.transposed for f in factors.values()}
    if len(orders) > 1:
        names = [next(n for n, f in factors.items() if f.transposed is t) for t in (False, True)]
        raise ValueError(
            f"{names[0]!r} is stored as [O, I] and {names[1]!r} as [I, O], which one adapter in "
            "PEFT's format cannot hold: linearize them in two goes"
        )
    tensors = {}
    for name, each in factors.items():
        for letter, tensor in (("A", each.down), ("B", each.up)):
            tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous()
    ranks = {name: len(each.down) for name, each in factors.items()}
    alphas = {name: each.scaling * ranks[name] for name, each in factors.items()}
    first = next(iter(factors))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": _others(ranks, ranks[first]),
        "alpha_pattern": _others(alphas, alphas[first]),
        "target_modules": sorted(factors),
        "fan_in_fan_out": orders.pop(),
        "bias": "none",
    }
    metadata = {
        "format": "pt",
        "fastmerge": FORMAT,
        "scaling": json.dumps({name: each.scaling for name, each in factors.items()}),
        "transposed": json.dumps({name: each.transposed for name, each in factors.items()}),
    }
    with new_folder(folder, overwrite) as partial:
        save_file(tensors, partial / WEIGHTS, metadata=metadata)
        write_text(partial / CONFIG, json.dumps(config, indent=1).encode())
    return folder


def _others(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """{pattern of one module's name: value} where it is not the usual one."""
    return {"^" + n.replace(".", r"\."): v for n, v in values.items() if v != usual}


def read_adapter(folder: Path) -> dict[str, Factors]:
    """{module name: factors} of what `write_adapter` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is not whole, or was written by something else.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected what save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if metadata.get("fastmerge") != FORMAT:
        raise CheckpointError(
            f"{path}: not written by a linearised model ({FORMAT!r} is not in its metadata); to "
            "train on from another LoRA, pass its folder to linearize(model, start=...)"
        )
    about = {key: parse_json(metadata.get(key, "").encode(), f"{path}: {key}") for key in _ABOUT}
    found = {}
    for name, scaling in about["scaling"].items():
        pair = [tensors.pop(f"{PREFIX}{name}.lora_{letter}.weight", None) for letter in "AB"]
        if pair[0] is None or pair[1] is None:
            raise CheckpointError(f"{path}: a factor of {name!r} is missing")
        if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
            raise CheckpointError(f"{path}: scaling of {name!r} is {scaling!r}, expected a number")
        found[name] = Factors(*pair, float(scaling), about["transposed"].get(name) is True)
    if tensors:
        raise CheckpointError(f"{path}: unknown tensor {next(iter(tensors))!r}")
    return found


_ABOUT = ("scaling", "transposed")
