"""Experts: the encoder fine-tuned on one task each, cached so that none is trained twice."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .data import DemoDataError
from .model import Encoder, merged_state
from .settings import Settings
from .tasks import Split, TaskData

_RECIPE = 1  # raise it when training changes in a way that no other part of the fingerprint shows
_SETTINGS = ("expert_", "head_", "tokens")


@dataclass(frozen=True)
class Expert:
    """An expert's fine-tuned tensors by name, and the file that keeps them."""

    state: dict[str, Tensor]
    path: Path
    reused: bool


def fingerprint(
    encoder: Encoder, tasks: Mapping[str, TaskData], settings: Settings, seed: int
) -> str:
    """Hash of all that the experts' bytes depend on, but for the number of threads."""
    import transformers

    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    for task in tasks.values():
        digest.update(json.dumps(task.task.classes).encode())
        digest.update(task.train.ids.numpy().tobytes())
        digest.update(task.train.labels.numpy().tobytes())
    recipe = {key: value for key, value in vars(settings).items() if key.startswith(_SETTINGS)}
    versions = [torch.__version__, transformers.__version__]
    digest.update(json.dumps([_RECIPE, seed, recipe, versions], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def train(
    encoder: Encoder,
    rows: Split,
    head: Callable[[Tensor], Tensor],
    settings: Settings,
    seed: int,
    step_done: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Fine-tune the merged parameters on labelled rows; the encoder itself is left as it was.

    Cross entropy, AdamW, linear warm-up then linear decay to zero. The order of rows comes from
    `seed` alone, so a run with as many threads gives the same bytes.

    Returns:
        The fine-tuned tensors by parameter name.
    """
    base = merged_state(encoder)
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    try:
        fit(encoder, parameters, settings.expert_rate, rows, head, settings, seed, step_done)
        return merged_state(encoder)
    finally:
        encoder.load_state_dict(base, strict=False)


def fit(
    encoder: Encoder,
    parameters: Sequence[nn.Parameter],
    rate: float,
    rows: Split,
    head: Callable[[Tensor], Tensor],
    settings: Settings,
    seed: int,
    step_done: Callable[[], None] = lambda: None,
) -> None:
    """The training of `train`, of these parameters at this rate; it leaves no gradients behind."""
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, weight_decay=settings.expert_decay, fused=True
    )
    steps, warmup = settings.expert_steps, settings.expert_warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    try:
        for _ in range(steps):
            drawn = torch.randperm(len(rows), generator=generator)[: settings.expert_batch]
            ids = rows.ids[drawn]
            ids = ids[:, : int((ids != 0).sum(1).max())]  # padding every row shares adds nothing
            loss = F.cross_entropy(head(encoder(ids)), rows.labels[drawn])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step_done()
    finally:
        optimizer.zero_grad(set_to_none=True)


def obtain(
    encoder: Encoder,
    task: TaskData,
    head: Callable[[Tensor], Tensor],
    settings: Settings,
    seed: int,
    cache: Path,
    step_done: Callable[[], None] = lambda: None,
) -> Expert:
    """A task's expert: from the folder `cache` if it was trained before, else trained and kept.

    The file appears only when it is complete, so an interrupted run goes on with the first task
    that has none.

    Raises:
        DemoDataError: a kept file does not hold exactly the fine-tuned tensors.
    """
    name = task.task.name
    path = cache / f"{name}.safetensors"
    if path.is_file():
        return Expert(_read(path, merged_state(encoder)), path, reused=True)
    state = train(encoder, task.train, head, settings, task_seed(name, seed), step_done)
    _write(path, state)
    return Expert(state, path, reused=False)


def task_seed(task: str, seed: int) -> int:
    """The seed of a task's batches."""
    return zlib.crc32(f"{task} {seed}".encode())


def _write(path: Path, state: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(save(dict(state)))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors has one error class of its own for damaged files
        raise DemoDataError(f"expert {path} cannot be read ({error}); remove the file") from error
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in like.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise DemoDataError(
                f"expert {path}, tensor {name}: found {found.get(name)}, expected "
                f"{expected.get(name)}; remove the file"
            )
    return {name: state[name] for name in like}
