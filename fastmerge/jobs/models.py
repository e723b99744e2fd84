"""The models of a recipe, opened: headers, configuration, layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, Entry, LoraCheckpoint
from ..ops._library import FLOAT_DTYPES
from .folder import is_tied, read_config, vocabulary_size
from .layers import Stacks, find_stacks
from .places import ADAPTER_FILE
from .recipe import ModelName
from .yaml_reader import RecipeError


@dataclass(frozen=True)
class Model:
    """An opened model.

    Attributes:
        name: as the recipe has it.
        folder: where its configuration and tokenizer are.
        checkpoint: its tensors.
        config: its config.json, {} if there is none.
        stacks: its layers.
    """

    name: ModelName
    folder: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    stacks: Stacks

    @property
    def tensors(self) -> Mapping[str, Entry]:
        """{key: entry} of its headers."""
        return self.checkpoint.tensors

    @property
    def is_tied(self) -> bool | None:
        """Whether its output layer shares the input embedding, if its configuration tells."""
        return is_tied(self.config)

    def where(self, key: str) -> str:
        """A tensor in an error message: model, file and name."""
        entry = self.tensors.get(key)
        file = "" if entry is None else f"/{entry.file}"
        return f"{self.name}{file}: tensor {key!r}"

    def vocabulary_tensors(self) -> list[str]:
        """Names of tensors with one row a token: embeddings and output layers."""
        rows = vocabulary_size(self.config)
        return [
            key
            for key, entry in self.tensors.items()
            if self.stacks.locate(key) is None
            and entry.shape[:1] == (rows,)
            and entry.nbytes
            and (len(entry.shape) == 2 or key.endswith("bias"))
            and not any(word in key.lower() for word in ("pos", "wpe", "token_type", "norm"))
        ]


def open_models(
    names: Iterable[ModelName], folders: Mapping[str, Path], base: ModelName | None
) -> dict[ModelName, Model]:
    """Open every model of a recipe and check what its headers allow to check.

    Args:
        names: the models.
        folders: {folder as the recipe names it: where it is}.
        base: the base model, on which a model that is only an adapter is put.

    Raises:
        CheckpointError: a file that cannot be read safely.
        RecipeError: quantized weights, or an adapter without a base.
    """
    stored: dict[str, Checkpoint] = {}

    def open_folder(folder: str) -> Checkpoint:
        if folder not in stored:
            stored[folder] = Checkpoint.open(folders[folder], folder)
        return stored[folder]

    models = {}
    for name in names:
        folder, adapter = name.folder, name.adapter
        if adapter is None and (folders[folder] / ADAPTER_FILE).is_file():
            if base is None or base == name:
                raise RecipeError(f"{name}: is an adapter, and the recipe has no base_model for it")
            folder, adapter = base.folder, folder
        checkpoint = open_folder(folder)
        if adapter is not None:
            checkpoint = LoraCheckpoint(checkpoint, folders[adapter], str(name))
        config = read_config(folders[folder])
        model = Model(
            name, folders[folder], checkpoint, config, find_stacks(checkpoint.tensors, config)
        )
        _refuse_quantized(model)
        models[name] = model
    return models


def _refuse_quantized(model: Model) -> None:
    quantization = model.config.get("quantization_config")
    if isinstance(quantization, dict):
        kind = quantization.get("quant_method", "some method")
        raise RecipeError(
            f"{model.name}: its weights are quantized ({kind}, by config.json), expected "
            f"{', '.join(_plain(dtype) for dtype in FLOAT_DTYPES)}; convert it first"
        )
    for key, entry in model.tensors.items():
        if is_floating(entry.dtype) and entry.file_dtype not in FLOAT_DTYPES:
            raise RecipeError(
                f"{model.where(key)} is {_plain(entry.file_dtype)}, expected one of "
                f"{', '.join(_plain(dtype) for dtype in FLOAT_DTYPES)}"
            )


def is_floating(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are merged; others are copied."""
    return dtype.is_floating_point or dtype.is_complex


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
