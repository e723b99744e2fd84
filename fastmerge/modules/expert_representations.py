"""What experts make of unlabelled inputs: their representations, computed once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..checkpoint.lora import is_adapter
from ..learning import ShuffledBatches, Stream
from ..learning_step import call_model, row_count
from ..merged_functions import is_merged
from ..sources import read_experts
from .fingerprint import fingerprint
from .representations import Site, recording

COMPARE = ("mean", "first", "all")
READ_ROWS = 64  # rows at least that are read at once where a whole task is
FORMAT = "fastmerge representations 1"

Mask = Callable[[Any], Tensor | None]


def attention_mask(inputs: Any) -> Tensor | None:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


class Pool:
    """What of the sites' representations is compared."""

    def __init__(self, sites: Sequence[Site], compare: str, mask: Mask):
        self.sites, self.compare, self.mask = list(sites), compare, mask

    def of(self, found: Mapping[Site, Tensor], inputs: Any) -> list[Tensor]:
        """A tensor [B, d] a site, or [B, T, d] where all tokens are compared."""
        count, mask = row_count(inputs), self.mask(inputs)
        return [self._pooled(found[site], count, mask) for site in self.sites]

    def _pooled(self, value: Tensor, count: int, mask: Tensor | None) -> Tensor:
        tokens = value.reshape(count, -1, value.shape[-1])
        if self.compare == "first":
            return tokens[:, 0]
        if mask is None or mask.shape != tokens.shape[:2]:
            return tokens.mean(1) if self.compare == "mean" else tokens
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        if self.compare == "all":
            return tokens * weight
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


class Expert:
    """A task's expert: a module, or tensors in the place of the merged model's."""

    def __init__(self, task: str, expert: Any, encoder: nn.Module):
        self.task = task
        if isinstance(expert, nn.Module):
            self.module, self.call = expert, expert
            self.state = dict(expert.state_dict())
            return
        if isinstance(expert, (str, PathLike)) and is_adapter(expert):
            raise ValueError(
                f"expert {task!r} is a LoRA adapter, which its base model alone can tell: pass the "
                "expert as a module or state dict"
            )
        (self.state,) = read_experts({task: expert}).values()
        self.module = encoder
        _check_state(task, self.state, encoder)
        device = next(encoder.parameters()).device
        moved = {name: tensor.to(device) for name, tensor in self.state.items()}
        self.call = lambda *args, **kwargs: functional_call(encoder, moved, args, kwargs)

    @torch.no_grad()
    def representations(self, pool: Pool, inputs: Any) -> list[Tensor]:
        """What is compared, of the expert."""
        with recording(self.module, pool.sites) as found:
            call_model(self.call, inputs)
        for site in pool.sites:
            width = found[site].shape[-1] if site in found else "nothing"
            if width != site.width:
                raise ValueError(
                    f"expert {self.task!r} has width {width} at {site.label!r}, expected "
                    f"{site.width}"
                )
        return pool.of(found, inputs)


def _check_state(task: str, state: Mapping[str, Tensor], encoder: nn.Module) -> None:
    known = dict(encoder.named_parameters(remove_duplicate=False)) | dict(encoder.named_buffers())
    for name, tensor in state.items():
        if name not in known and tensor.is_floating_point():
            raise ValueError(f"expert {task!r} has a tensor {name!r}, which the model lacks")
        if name in known and known[name].shape != tensor.shape:
            raise ValueError(
                f"expert {task!r}: {name!r} is {list(tensor.shape)}, expected "
                f"{list(known[name].shape)}"
            )
    for name, parameter in encoder.named_parameters():
        if is_merged(parameter) and name not in state:
            raise ValueError(f"expert {task!r} lacks {name!r}, which is merged in the model")


class Part:
    """A task's batch of one step, and what the expert makes of it."""

    def __init__(self, inputs: Any, targets: Sequence[Tensor], rows: Tensor | None = None):
        self.inputs, self.targets, self.rows = inputs, targets, rows


class Source:
    """A task's batches with the expert's representations, read once where rows are known."""

    def __init__(self, task: str, batches: Iterable[Any], expert: Expert, pool: Pool, cache: Any):
        self.batches, self.expert, self.pool = batches, expert, pool
        self.targets: list[Tensor] | None = None
        if not isinstance(batches, ShuffledBatches):
            self.stream = Stream(task, batches, 0)
            return
        self.stream = Stream(task, batches.indices(), 0)
        path = None if cache is None else Path(cache) / f"{self._digest()}.safetensors"
        if path is not None and path.is_file():
            self.targets = _read(path, len(pool.sites), batches.rows)
        else:
            self.targets = self.read(lambda inputs: expert.representations(pool, inputs))
            if path is not None:
                _write(path, self.targets)

    def next(self) -> Part:
        """The next batch."""
        found = self.stream.next()
        if self.targets is None:
            return Part(found, self.expert.representations(self.pool, found))
        return Part(self.batches.at(found), [t[found.to(t.device)] for t in self.targets], found)

    def read(self, function: Callable[[Any], list[Tensor]]) -> list[Tensor]:
        """A function's tensors of all rows."""
        size = max(self.batches.batch_size, READ_ROWS)
        parts = [function(self.batches.at(i)) for i in torch.arange(self.batches.rows).split(size)]
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def _digest(self) -> str:
        """What tells these representations from others."""
        inputs = pytree.tree_leaves(self.batches.inputs)
        mask = self.pool.mask(self.batches.inputs)
        tensors = {str(k): t for k, t in enumerate([*inputs, *([] if mask is None else [mask])])}
        about = [str(self.pool.sites), self.pool.compare, mask is None]
        about += [fingerprint(self.expert.state), fingerprint(tensors)]
        return hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()


def _read(path: Path, count: int, rows: int) -> list[Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = [file.get_tensor(str(k)) for k in range(count)]
            known = (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not known or any(len(t) != rows for t in found):
        raise ValueError(f"{path}: not {FORMAT!r} of {rows} rows; remove it")
    return found


def _write(path: Path, tensors: Sequence[Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    named = {str(k): t.cpu().contiguous() for k, t in enumerate(tensors)}
    save_file(named, partial, metadata={"format": FORMAT})
    partial.replace(path)
