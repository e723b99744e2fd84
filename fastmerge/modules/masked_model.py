"""`MaskedModel`: every task is a mask of one unified task vector, and a scale."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..attachment import attach_deltas, check_unattached, parameter_places
from ..checking import Patterns, check_models, running_statistics, select_names
from ..deltas import Masked
from ..row_coefficients import RowCoefficients
from ..sample_values import SampleValues
from ..sources import read_experts, read_tensors
from .copies import with_values
from .dynamic import DynamicModel, check_batch


class MaskedModel(DynamicModel):
    """A model with W_b = W_0 + s_t M_t * tau for sample b of task t.

    One task vector tau for all tasks, one bit an entry a task (M_t), one number a task (s_t). No
    W_b is built; all tensors of the model compute like this, norms and embeddings too.

    Args:
        model: the base model, whose parameters become merged weights.
        deltas: {parameter name: unified task vector and masks}.
        tasks: names of the K tasks.
        scales: [K], s.
        statistics: {buffer name: value} of running statistics, the experts' mean.

    Attributes:
        scales: [K], a buffer.

    Raises:
        RuntimeError: the model runs outside of `with fastmerge.task(model, ids)`.
        ValueError: it runs with ids of another number of samples than its inputs have.
    """

    def __init__(
        self,
        model: nn.Module,
        deltas: Mapping[str, Masked],
        tasks: Sequence[str],
        scales: Tensor,
        statistics: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.model, self.tasks = with_values(model, statistics or {}), list(tasks)
        self.scales: Tensor
        self.register_buffer("scales", scales)
        self.statistics = sorted(statistics or {})
        self.rows = RowCoefficients(list(deltas), self.tasks)
        self.count: int | None = None
        attach_deltas(self.model, deltas, self.rows)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.count is not None:
            check_batch(self.count, args, kwargs)
        output = self.model(*args, **kwargs)
        return pytree.tree_map(lambda y: y.of_batch() if isinstance(y, SampleValues) else y, output)

    @contextlib.contextmanager
    def select(self, rows: Tensor) -> Iterator[None]:
        former, self.count = self.count, None if rows.dim() == 1 else len(rows)
        try:
            with self.rows.using(_shared(rows) * self.scales):
                yield
        finally:
            self.count = former

    def fold(self, task: str) -> dict[str, Tensor]:
        row = F.one_hot(torch.tensor(self.tasks.index(task)), len(self.tasks))
        with torch.no_grad(), self.select(row.to(self.scales)):
            return {n: t.detach().clone() for n, t in self.model.state_dict().items()}

    def bits(self) -> Tensor:
        """How many entries each task's masks keep, int64 [K]."""
        kept = [self._deltas(name).unpacked().flatten(1).sum(1) for name in self.rows.names]
        return torch.stack(kept).sum(0)

    def nbytes(self) -> int:
        """Bytes beside the base model: the unified task vector, the masks and the scales."""
        return self.scales.nbytes + sum(self._deltas(n).nbytes() for n in self.rows.names)

    def tensors(self) -> dict[str, Tensor]:
        buffers = dict(self.model.named_buffers())
        saved = {f"buffer.{name}": buffers[name] for name in self.statistics}
        for name in self.rows.names:
            deltas = self._deltas(name)
            saved |= {f"unified.{name}": deltas.unified, f"masks.{name}": deltas.masks}
        return saved | {"scales": self.scales}

    def config(self) -> dict[str, Any]:
        return {"tasks": self.tasks}

    @classmethod
    def restore(
        cls, model: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]
    ) -> MaskedModel:
        check_unattached(model)
        parts: dict[str, dict[str, Tensor]] = {"unified": {}, "masks": {}, "buffer": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if name:
                parts[part][name] = tensor
        parameters = dict(model.named_parameters())
        names = [name for name in parameters if name in parts["unified"]]  # the model's own order
        deltas = {name: Masked(parts["unified"][name], parts["masks"][name]) for name in names}
        return cls(model, deltas, config["tasks"], tensors["scales"], parts["buffer"])

    def _deltas(self, name: str) -> Masked:
        return self.model.get_parameter(name).deltas


@dataclass
class Inputs:
    """A base model and its experts, checked and lined up.

    Attributes:
        tasks: names of the experts.
        base: {parameter name: the base's tensor}.
        experts: {parameter name: the K experts' tensors}.
        statistics: {buffer name: mean of the experts' running statistics}.
    """

    tasks: list[str]
    base: dict[str, Tensor]
    experts: dict[str, list[Tensor]]
    statistics: dict[str, Tensor]


def read_inputs(model: nn.Module, experts: Any, exclude: Patterns, allow_nonfinite: bool) -> Inputs:
    """Line experts up with a base model; nothing is copied, checkpoints are mapped.

    Raises:
        ValueError: the model is attached, or experts do not match it, or there is none.
    """
    check_unattached(model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    _, tied = parameter_places(model)
    floating = [name for name, p in parameters.items() if p.is_floating_point()]
    names = select_names(floating, None, exclude)
    base = {name: parameters[name].detach() for name in names}
    statistics = {name: buffers[name] for name in running_statistics(model)}
    tasks, tensors = check_models(
        base | statistics,
        read_experts(experts, read_tensors(model, "base")),
        known=[*tied, *buffers],
        tied=tied,
        allow_nonfinite=allow_nonfinite,
    )
    means = {n: torch.stack([t.float() for t in tensors[n]]).mean(0) for n in statistics}
    return Inputs(tasks, base, {name: tensors[name] for name in names}, means)


def _shared(rows: Tensor) -> Tensor:
    """One row [K] if all samples have the same, which every function can compute with."""
    alike = rows.dim() == 2 and rows.device.type == "cpu" and bool((rows == rows[:1]).all())
    return rows[0] if alike else rows
