"""`recalibrate`: running statistics of normalization layers from unlabelled inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attachment import attachment_of
from .learning_step import call_model, join

_KEPT = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    steps: int | None = None,
) -> nn.Module:
    """Replace running means and variances by those of the merged model on unlabelled inputs.

    Averages of experts' statistics are those of no model. Here every layer with running statistics
    (BatchNorm and its kin) gets, over n batches B_i of its own inputs x in this model,

        mean = (1 / n) sum_i mean(x of B_i),  variance = (1 / n) sum_i var(x of B_i),

    per channel, the variance unbiased, as torch's BatchNorm with momentum=None accumulates them.
    Passes run without gradients; all other layers are in evaluation mode. Variance between
    batches is not counted, so a batch should hold rows of every task that the model serves: tasks
    given as a mapping are joined into one batch a step where their inputs have equal shapes.

    Args:
        model: merged weights (`fastmerge.attach`), materialized, or any other model.
        batches: an iterable of inputs as for `fastmerge.learn` (tensor, tuple or dict), or {task:
            iterable}, of which each step takes one batch a task.
        steps: how many batches (a task) at most; needed if an iterable has no end, such as
            `fastmerge.ShuffledBatches`. By default as many as the shortest iterable gives.

    Returns:
        The model, changed in place; `fastmerge.detach` restores the base model's statistics.

    Raises:
        ValueError: the model has no running statistics, or there is no batch.
        FloatingPointError: a statistic is NaN or Inf. Statistics stay as they were then, and if
            the model itself raises.

    Source: Averaging Weights Leads to Wider Optima (arXiv 1803.05407), section 3; REPAIR (arXiv
    2211.08403) for merged models.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
    }
    if not layers:
        raise ValueError("recalibrate: the model has no layer with running statistics")
    before = {
        f"{name}.{kind}" if name else kind: getattr(layer, kind).clone()
        for name, layer in layers.items()
        for kind in _KEPT
    }
    modes = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers.values()}
    try:
        model.eval()
        for layer in layers.values():
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None
        _run(model, batches, steps)
        _check_finite(layers)
    except BaseException:
        _restore(model, before)
        raise
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
    record = attachment_of(model)
    if record is not None:
        record.statistics = before | record.statistics
    return model


def _run(model: nn.Module, batches: Any, steps: int | None) -> None:
    count = 0
    with torch.no_grad():
        for inputs in _steps(batches):
            if count == steps:
                break
            joined = join(inputs) if len(inputs) > 1 else None
            for batch in inputs if joined is None else [joined[0]]:
                call_model(model, batch)
            count += 1
    if not count:
        raise ValueError("recalibrate: there is no batch")


def _steps(batches: Any) -> Iterator[list[Any]]:
    """The batches of each step, one a task."""
    if isinstance(batches, Mapping):
        yield from (list(step) for step in zip(*batches.values(), strict=False))
    else:
        yield from ([batch] for batch in batches)


def _check_finite(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        for kind in ("running_mean", "running_var"):
            if not bool(torch.isfinite(getattr(layer, kind)).all()):
                raise FloatingPointError(
                    f"recalibrate: {kind} of {name!r} is NaN or Inf; are the inputs finite, and is "
                    "there more than one value per channel? Statistics were left as they are"
                )


def _restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            buffers[name].copy_(value)
