"""One step of `learn`: forward and backward passes over all tasks, eager or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .objectives import Batch, Objective

NO_GRADIENT = (
    "step {step}: no gradient reaches the coefficients. Does the model hold merged weights, do "
    "heads and objective keep the graph, and is activation checkpointing non-reentrant "
    "(use_reentrant=False)?"
)
WARM_UP_STEPS = 3  # eager runs before a capture: libraries and kernels choose their launches

Values = dict[str, Tensor]
Targets = dict[str, Tensor | None]


class EagerStep:
    """Losses and gradients of all tasks, op by op.

    Args:
        model: the model with merged weights.
        parameters: the coefficients' parameters, whose gradients a call leaves behind.
        heads: {task: callable on the model's output}; a task without takes the output itself.
        expert_logits: {task: callable(inputs) or the expert's module}, as for `learn`.
        objective: callable(logits, Batch) -> scalar.
        dtype: 16-bit dtype of the model's matrix products (autocast), None for the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        heads: Mapping[str, Callable],
        expert_logits: Mapping[str, Callable],
        objective: Objective,
        dtype: torch.dtype | None = None,
    ):
        self.model, self.parameters, self.heads = model, parameters, heads
        self.expert_logits, self.objective, self.dtype = expert_logits, objective, dtype

    def __call__(
        self, inputs: dict[str, Any], step: int, targets: Targets | None = None
    ) -> tuple[Values, Values]:
        """Scalar losses and logits per task, detached; gradients are in the parameters.

        `targets`: the experts' logits on these inputs where they are known already.
        """
        for parameter in self.parameters:
            parameter.grad = None
        return self.run(inputs, self.targets(inputs) if targets is None else targets, step)

    def targets(self, inputs: dict[str, Any]) -> Targets:
        """The experts' logits on these inputs, None where there is no expert."""
        return {task: self._expert_logits(task, batch) for task, batch in inputs.items()}

    def run(self, inputs: dict[str, Any], targets: Targets, step: int) -> tuple[Values, Values]:
        """Forward and backward passes; gradients are added up, nothing is read by the host."""
        joined = None if mixes_rows(self.model) else join(list(inputs.values()))
        if joined is not None and len(inputs) > 1:
            merged, rows = joined
            outputs = _split(self._output(merged), rows)
            if outputs is not None:
                together = dict(zip(inputs, outputs, strict=True))
                return self._backward(together, inputs, targets, step)
        losses: Values = {}
        logits: Values = {}
        for task, batch in inputs.items():
            output = {task: self._output(batch)}
            task_losses, task_logits = self._backward(output, inputs, targets, step)
            losses |= task_losses
            logits |= task_logits
        return losses, logits

    def _output(self, inputs: Any) -> Any:
        """The model's output on a batch; under autocast in fp32, for heads and objective."""
        if self.dtype is None:
            return call_model(self.model, inputs)
        device = self.parameters[0].device.type
        # nothing to cache: merged weights have no copy in another dtype
        with torch.autocast(device, self.dtype, cache_enabled=False):
            output = call_model(self.model, inputs)
        return pytree.tree_map_only(
            Tensor, lambda t: t.float() if t.dtype == self.dtype else t, output
        )

    def _backward(self, outputs, inputs, targets, step) -> tuple[Values, Values]:
        losses, logits = {}, {}
        for task, output in outputs.items():
            logits[task] = self._logits(task, output)
            losses[task] = self.objective(logits[task], Batch(task, inputs[task], targets[task]))
        total = sum(losses.values())
        if not total.requires_grad:
            raise RuntimeError(NO_GRADIENT.format(step=step))
        total.backward()
        return {t: v.detach() for t, v in losses.items()}, {
            t: v.detach() for t, v in logits.items()
        }

    def _logits(self, task: str, output: Any) -> Tensor:
        logits = self.heads[task](output) if task in self.heads else output
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"logits of task {task!r} are {type(logits).__name__}, expected a tensor: pass "
                "heads={task: callable on the model's output}"
            )
        return logits

    def _expert_logits(self, task: str, inputs: Any) -> Tensor | None:
        source = self.expert_logits.get(task)
        if source is None:
            return None
        with torch.no_grad():
            if isinstance(source, nn.Module):
                return self._logits(task, call_model(source, inputs))
            return source(inputs)


class GraphedStep(EagerStep):
    """The same step captured once in a CUDA graph and replayed: no launch overhead, no Python.

    Every step's inputs must have the shapes of the first; experts run outside the graph. Losses
    and gradients are those of the eager step.

    Raises:
        ValueError: the coefficients are not on a CUDA device, or shapes change between steps.
    """

    def __init__(self, model, parameters, heads, expert_logits, objective, dtype=None):
        super().__init__(model, parameters, heads, expert_logits, objective, dtype)
        device = parameters[0].device
        if device.type != "cuda":
            raise ValueError(f"cuda_graph needs the model on a CUDA device, it is on {device}")
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, inputs: dict[str, Any], step: int, targets: Targets | None = None
    ) -> tuple[Values, Values]:
        targets = self.targets(inputs) if targets is None else targets
        if self.graph is None:
            self._capture(inputs, targets, step)
        self._copy(self.inputs, inputs, step)
        self._copy(self.targets_, targets, step)
        self.graph.replay()
        return self.results

    def _capture(self, inputs, targets, step) -> None:
        self.inputs, self.targets_ = (
            pytree.tree_map(lambda t: t.clone() if _is_tensor(t) else t, kept)
            for kept in (inputs, targets)
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._zero_and_run(step)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = self._zero_and_run(step)

    def _zero_and_run(self, step: int) -> tuple[Values, Values]:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.zero_()
        return self.run(self.inputs, self.targets_, step)

    def _copy(self, kept: Any, given: Any, step: int) -> None:
        old, new = (pytree.tree_leaves(values) for values in (kept, given))
        for target, source in zip(old, new, strict=True):
            if not _is_tensor(target):
                continue
            if target.shape != source.shape:
                raise ValueError(
                    f"step {step}: an input has shape {list(source.shape)}, expected "
                    f"{list(target.shape)} as in the first step: cuda_graph needs equal shapes"
                )
            target.copy_(source)


def call_model(model: Callable, inputs: Any) -> Any:
    """model(**inputs) for a dict, model(*inputs) for a tuple or list, else model(inputs)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def row_count(inputs: Any) -> int:
    counts = {t.shape[0] if t.dim() else 0 for t in pytree.tree_leaves(inputs) if _is_tensor(t)}
    if len(counts) != 1:
        raise ValueError(f"inputs must hold tensors with one number of rows, got {sorted(counts)}")
    return counts.pop()


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def join(inputs: list[Any]) -> tuple[Any, list[int]] | None:
    """All tasks' inputs as one batch and the rows of each, or None if shapes differ."""
    flat = [pytree.tree_flatten(i) for i in inputs]
    leaves, spec = [f[0] for f in flat], flat[0][1]
    every = [leaf for task in leaves for leaf in task]
    if any(f[1] != spec for f in flat) or not all(_is_tensor(t) and t.dim() > 0 for t in every):
        return None
    columns = list(zip(*leaves, strict=True))
    if any(len({(t.shape[1:], t.dtype, t.device) for t in column}) > 1 for column in columns):
        return None
    rows = [task[0].shape[0] for task in leaves]
    if any(t.shape[0] != n for task, n in zip(leaves, rows, strict=True) for t in task):
        return None
    return pytree.tree_unflatten([torch.cat(column) for column in columns], spec), rows


def _split(output: Any, rows: list[int]) -> list[Any] | None:
    """The output of a joined batch per task, or None where its rows cannot be told apart."""
    leaves, spec = pytree.tree_flatten(output)
    total = sum(rows)
    if not all(_is_tensor(t) and t.dim() > 0 and t.shape[0] == total for t in leaves):
        return None
    parts = [leaf.split(rows) for leaf in leaves]
    return [pytree.tree_unflatten([part[i] for part in parts], spec) for i in range(len(rows))]


def mixes_rows(model: nn.Module) -> bool:
    """Whether a row's output depends on the other rows: statistics or coefficients of the batch."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return any(
        (isinstance(m, batch_norm) and m.training) or getattr(m, "mixes_rows", False)
        for m in model.modules()
    )
