"""`build`, `task`, `fold`: models that keep something of every expert and compute with it."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..attachment import check_unattached
from .fingerprint import fingerprint

# {method: (file, class)}; each is imported when it is asked for.
METHODS = {
    "emr": ("emr", "Emr"),
    "surgery": ("surgery", "Surgery"),
    "surgery_v2": ("surgery", "SurgeryV2"),
    "tact": ("tact", "Tact"),
    "tall": ("tall", "Tall"),
    "twin": ("twin", "TwinMerging"),
    "wemoe": ("wemoe", "WEMoE"),
}

TaskIds = str | int | Sequence[str | int] | Tensor


class DynamicModel(nn.Module):
    """A merged model that has something of its own for every task.

    Attributes:
        method: its name in `METHODS`.
        model: the model that computes.
        tasks: names of the K tasks, the experts' names.
        base: fingerprint of the base model; None if it was not made by `fastmerge.build` or
            `fastmerge.load`.
    """

    method: ClassVar[str]
    model: nn.Module
    tasks: list[str]
    base: str | None = None

    @classmethod
    def build(cls, model: nn.Module, experts: Any, **options: Any) -> DynamicModel:
        """Make one from a base model and experts, as `fastmerge.build` describes."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> AbstractContextManager[None]:
        """Compute with these tasks within the context: one-hot rows [B, K], or [K] for all."""
        raise TypeError(f"{self.method} follows from its inputs: there is no task to select")

    def fold(self, task: str) -> dict[str, Tensor]:
        """An ordinary state dict for one task, as `fastmerge.fold` describes."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """What is saved beside the tensors, for JSON."""
        raise NotImplementedError

    @classmethod
    def restore(
        cls, model: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]
    ) -> DynamicModel:
        """The model that `tensors` and `config` are of, on its base model."""
        raise NotImplementedError

    @classmethod
    def fingerprint_of(cls, model: nn.Module) -> str:
        """What tells a base model from another.

        Raises:
            ValueError: it cannot be one: it has merged weights already.
        """
        check_unattached(model)
        return fingerprint(model.state_dict())


def method_class(method: str) -> type[DynamicModel]:
    """The class of a dynamic method.

    Raises:
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown dynamic method {method!r}, expected one of {', '.join(METHODS)}")
    file, name = METHODS[method]
    return getattr(importlib.import_module(f".{file}", __package__), name)


def build(
    model: nn.Module,
    experts: Mapping[str, Any] | Sequence[Any],
    *,
    method: str,
    **options: Any,
) -> DynamicModel:
    """Merge experts into a model that keeps something of each and computes with it.

    Nothing is ever rebuilt when the task changes: a batch may have a task of its own for every
    sample, and the layers take it into account while they compute.

    Args:
        model: the base model; left as it is. What does not change is shared with it, so it must
            not change either.
        experts: K fine-tuned models, as a list or {task: expert}: modules, state dicts, or paths
            of checkpoint folders, safetensors files or LoRA adapters.
        method: "emr" (masks of one unified task vector), "tall" (masks of the merged one), "twin"
            (low-rank parts and a router), "wemoe" (MLPs mixed by routers), or "surgery",
            "surgery_v2" (adapters on representations) and "tact" (affines of activations), for
            which `model` is a merged model.
        options: the method's own, see `fastmerge.modules`.

    Returns:
        A module that is called as the model is, within `with fastmerge.task(dynamic, ids)` where
        the method has no router.

    Raises:
        ValueError: unknown method; experts do not match the base, or there is none; an option is
            out of range. Nothing is changed then.
        TypeError: the method has no such option.
    """
    cls = method_class(method)
    known = [p for p in inspect.signature(cls.build).parameters if p not in ("model", "experts")]
    for given in options:
        if given not in known:
            near = difflib.get_close_matches(given, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise TypeError(f"method {method!r} has no option {given!r}: {hint}")
    dynamic = cls.build(model, experts, **options)
    dynamic.base = cls.fingerprint_of(model)
    return dynamic


def task(model: DynamicModel, ids: TaskIds) -> AbstractContextManager[None]:
    """Within the context, a dynamic model computes with these tasks.

    Args:
        model: what `build` gave.
        ids: the task of all samples, a name or an index; or one for every sample of the batch, as
            a sequence of names or indices or an integer tensor [B].

    Raises:
        ValueError: an unknown name, an index out of range, or no ids. A batch of another size is
            refused when the model runs.
        TypeError: ids are none of these, or the model is not dynamic.
    """
    if not hasattr(model, "select") or not hasattr(model, "tasks"):
        raise TypeError(
            f"fastmerge.task: expected a model of fastmerge.build, got {type(model).__name__}"
        )
    chosen = task_indices(model.tasks, ids)
    device = next(model.parameters()).device
    return model.select(F.one_hot(chosen.to(device), len(model.tasks)).float())


def task_indices(tasks: Sequence[str], ids: TaskIds) -> Tensor:
    """Positions of tasks: int64 [] for one id, [B] for a sequence.

    Raises:
        ValueError, TypeError: as `task` says.
    """
    if isinstance(ids, Tensor):
        if ids.dim() > 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(
                f"task ids are {ids.dtype} {list(ids.shape)}, expected integers [B] or names"
            )
        chosen = ids.long()
        if ids.numel() and bool(((chosen < 0) | (chosen >= len(tasks))).any()):
            wrong = chosen[(chosen < 0) | (chosen >= len(tasks))].flatten()[0]
            _index(tasks, int(wrong))
    elif isinstance(ids, (str, int)):
        chosen = torch.tensor(_index(tasks, ids))
    elif isinstance(ids, Sequence):
        chosen = torch.tensor([_index(tasks, each) for each in ids], dtype=torch.int64)
    else:
        raise TypeError(f"task ids are a {type(ids).__name__}, expected names or indices")
    if chosen.numel() == 0:
        raise ValueError("task ids are empty, expected one for every sample")
    return chosen


def _index(tasks: Sequence[str], given: object) -> int:
    if isinstance(given, str):
        if given not in tasks:
            raise ValueError(f"unknown task {given!r}, expected one of {list(tasks)}")
        return list(tasks).index(given)
    if not isinstance(given, int) or isinstance(given, bool):
        raise TypeError(f"task id {given!r} is a {type(given).__name__}, expected a name or index")
    if not 0 <= given < len(tasks):
        raise ValueError(f"task index {given} is not in 0..{len(tasks) - 1} ({list(tasks)})")
    return given


def fold(model: DynamicModel, task: str | int, **options: Any) -> dict[str, Tensor]:
    """An ordinary state dict for one task of a dynamic model.

    Args:
        model: what `build` gave.
        task: the task, a name or an index.
        options: the method's own, for example `batches` of WEMoE.

    Returns:
        {name: tensor} like the base model's, with memory of its own.

    Raises:
        ValueError: an unknown task.
    """
    return model.fold(model.tasks[int(task_indices(model.tasks, task))], **options)


def check_batch(count: int, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless the first tensor of a model's inputs has so many samples."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            if leaf.shape[0] != count:
                raise ValueError(
                    f"{count} task ids for a batch of {leaf.shape[0]} samples: the model's input "
                    f"is {list(leaf.shape)}"
                )
            return
