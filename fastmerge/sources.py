"""Where models come from: modules, state dicts, checkpoint folders and files, LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from torch import Tensor, nn

from .checkpoint import Checkpoint, Entry, LoraCheckpoint
from .checkpoint.lora import is_adapter


def read_tensors(model: Any, what: str) -> dict[str, Tensor]:
    """Tensors of a module or state dict by name, detached and not copied.

    Args:
        model: module, or mapping from tensor name to tensor.
        what: the model's name in error messages, for example "base".

    Raises:
        TypeError: neither of these, or an entry is not a tensor.
    """
    if isinstance(model, nn.Module):
        return dict(model.state_dict())
    if not isinstance(model, Mapping):
        raise TypeError(f"{what}: expected a module or a state dict, got {type(model).__name__}")
    for name, tensor in model.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}: entry {name!r} is {type(tensor).__name__}, expected a tensor")
    return {name: tensor.detach() for name, tensor in model.items()}


def read_experts(
    experts: Any, base: Mapping[str, Tensor] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Tensors of every expert, {expert name: {tensor name: tensor}}.

    Checkpoints are mapped into memory: their tensors are views of the files, read when they are
    computed with, so the files must stay as they are.

    Args:
        experts: {name: expert} or a list of experts, then called expert0, expert1, ...; each a
            module, a state dict, the path of a safetensors file or of a folder of them (one file,
            or shards with an index), or the path of a LoRA adapter in PEFT's format.
        base: the base model's tensors, to which adapters are added; the tensors an adapter changes
            are computed whole, the others are the base's.

    Raises:
        TypeError: not such a collection, or an expert is none of these.
        ValueError: there is no expert, or a file is not what it should be; pickles are refused.
    """
    named = named_experts(experts)
    return {name: _read_expert(expert, name, base) for name, expert in named.items()}


def named_experts(experts: Any) -> dict[str, Any]:
    """{name: expert} of a mapping or list; those of a list are called expert0, expert1, ...

    Raises:
        TypeError: not such a collection.
        ValueError: there is no expert.
    """
    if isinstance(experts, Mapping):
        if any(isinstance(value, Tensor) for value in experts.values()):
            raise TypeError("experts: expected several experts, got one state dict; pass a list")
        named = {str(name): expert for name, expert in experts.items()}
    elif isinstance(experts, Sequence) and not isinstance(experts, (str, bytes)):
        named = {f"expert{k}": expert for k, expert in enumerate(experts)}
    else:
        raise TypeError(
            f"experts: expected a list of experts or {{name: expert}}, got {type(experts).__name__}"
        )
    if not named:
        raise ValueError("experts is empty, expected K >= 1 experts")
    return named


def _read_expert(expert: Any, name: str, base: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if not isinstance(expert, (str, PathLike)):
        return read_tensors(expert, name)
    if base is not None and is_adapter(expert):
        opened = LoraCheckpoint(LoadedModel(base), expert, name)
    else:
        opened = Checkpoint.open(expert, name)
    with opened as checkpoint:
        return {key: checkpoint.read(key) for key in checkpoint.tensors}


class LoadedModel:
    """A model in memory with as much of `Checkpoint`'s interface as an adapter needs."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.name, self.metadata, self._tensors = "base", {}, tensors
        self.tensors = {
            key: Entry(tensor.dtype, tuple(tensor.shape), "", tensor.nbytes)
            for key, tensor in tensors.items()
        }

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor; the tensor itself for all of them."""
        return self._tensors[key] if stop is None and start == 0 else self._tensors[key][start:stop]
