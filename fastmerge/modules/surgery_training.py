"""`train_surgery`: adapters that come close to the experts' representations, without labels."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attachment import attachment_of
from ..learning import History, frozen, progress_bar
from ..learning_step import call_model, join, mixes_rows, row_count
from .dynamic import task as selected
from .expert_representations import COMPARE, Expert, Mask, Part, Pool, Source, attention_mask
from .representations import recording
from .surgery import Surgery

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}
UPDATES = ("own", "shared")


def train_surgery(
    model: Surgery,
    batches: Mapping[str, Iterable[Any]],
    experts: Mapping[str, Any],
    *,
    steps: int = 500,
    lr: float = 1e-3,
    compare: str = "mean",
    distance: str = "l1",
    updates: str = "own",
    mask: Mask | None = None,
    cache: str | Path | None = None,
    progress: bool | None = None,
) -> History:
    """Train the adapters of a surgery model, from unlabelled inputs.

    minimise sum_t sum_l mean |p(H_l) - p(H_l of expert t)| over the adapters of task t, l the
    model's sites (`Surgery.sites`), p the mean over tokens. Gradients flow through the frozen
    blocks in between; weights are never merged again. Tasks whose inputs have equal shapes run in
    one forward pass. The model runs in the mode (train or eval) it is in. With one representation
    alone that has no tokens, as `surgery` mostly has, the encoder runs once over all inputs.

    Args:
        model: what `fastmerge.build(..., method="surgery")` or "surgery_v2" gave.
        batches: {task: iterable of inputs}, one batch a task and step; an iterable that ends
            starts again. Of `ShuffledBatches` the experts read every row once; of others, every
            batch again. Tasks that are left out keep their adapters.
        experts: {task: expert}: modules of the same structure, or state dicts or paths of
            checkpoints, whose tensors take the place of the merged model's.
        steps: updates of every task's adapters; the published code makes 1000, two batches in each
            of 500 iterations.
        lr: Adam's learning rate (betas 0.9, 0.999, no weight decay).
        compare: p: the "mean" over tokens (the published code), the "first" token, or "all".
        distance: "l1", or "l2", the mean square.
        updates: "own": every task's adapters have an Adam of their own. "shared": one Adam that
            steps after each task's batch in turn, as the published code under its version of
            torch, where the momentum of the tasks that are not its turn moves them on.
        mask: function from inputs to the tokens that count, [B, T], or None for all; by default
            the `attention_mask` of inputs that are a dict.
        cache: folder that keeps the experts' representations of `ShuffledBatches` from one run to
            the next; they are found again by expert, inputs and sites.
        progress: show a progress bar; by default on a terminal.

    Returns:
        The history; the adapters themselves are changed in place.

    Raises:
        ValueError: tasks, experts or options do not fit, or an expert has no such blocks.
        FloatingPointError: a loss is NaN or Inf; names step and task, the adapters stay as they
            were after the last good step.

    Source: Representation Surgery (arXiv 2402.02705), SurgeryV2 (arXiv 2410.14389): Adam 1e-3,
    batch 16. The papers' code compares means over tokens; it also has an L2 variant, unused.
    """
    _check(model, batches, experts, steps, compare, distance, updates)
    pool = Pool(model.sites, compare, mask or attention_mask)
    encoder = model.encoder
    history = History(task_loss={task: [] for task in batches})
    stepper = torch.optim.Adam(model.adapters.parameters(), lr=lr)
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for part in (model, *_coefficients(encoder)):
            stack.enter_context(frozen(part, model.adapters))
        sources = {
            task: Source(task, batches[task], Expert(task, experts[task], encoder), pool, cache)
            for task in batches
        }
        step_of = _read_once(model, sources) or _through_the_model
        report = stack.enter_context(progress_bar(steps, progress, "training adapters"))
        groups = [[task] for task in batches] if updates == "shared" else [list(batches)]
        for step in range(steps):
            losses: dict[str, float] = {}
            for tasks in groups:
                stepper.zero_grad()
                parts = {task: sources[task].next() for task in tasks}
                for task, loss in step_of(model, parts, pool, DISTANCES[distance]).items():
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"step {step}: the loss of task {task!r} is {loss}; the adapters were "
                            "left as they are"
                        )
                    losses[task] = loss
                stepper.step()
            history.loss.append(sum(losses.values()))
            for task, loss in losses.items():
                history.task_loss[task].append(loss)
            report(step + 1, history.loss[-1])
    stepper.zero_grad()
    if model.base is not None:  # coefficients may have moved since the model was built
        model.base = type(model).fingerprint_of(model.model)
    history.seconds = time.perf_counter() - begun
    return history


def _check(model, batches, experts, steps, compare, distance, updates) -> None:
    if not isinstance(model, Surgery):
        raise TypeError(
            f"train_surgery: expected a model of fastmerge.build(..., method='surgery'), got "
            f"{type(model).__name__}"
        )
    if not batches:
        raise ValueError("batches is empty: expected {task: iterable of inputs}")
    for task in batches:
        if task not in model.tasks:
            raise ValueError(f"unknown task {task!r}, expected one of {model.tasks}")
        if task not in experts:
            raise ValueError(f"experts has no entry for task {task!r}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    options = {
        "compare": (compare, COMPARE),
        "distance": (distance, tuple(DISTANCES)),
        "updates": (updates, UPDATES),
    }
    for name, (given, known) in options.items():
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")


def _coefficients(model: nn.Module) -> list[nn.Module]:
    """The coefficients of attached models, which are no part of theirs."""
    records = [attachment_of(module) for module in model.modules()]
    found = [record.coefficients for record in records if record is not None]
    return [c for c in found if isinstance(c, nn.Module)]


Step = Callable[..., dict[str, float]]


def _through_the_model(
    model: Surgery, parts: Mapping[str, Part], pool: Pool, distance: Callable
) -> dict[str, float]:
    """Losses of the tasks' batches; gradients are added up in the adapters."""
    losses: dict[str, float] = {}
    for tasks in _together(model, parts):
        given = [parts[task].inputs for task in tasks]
        inputs = join(given)[0] if len(tasks) > 1 else given[0]
        counts = [row_count(i) for i in given]
        ids = _ids(model, tasks, counts)
        with selected(model, ids), recording(model.encoder, pool.sites) as found:
            call_model(model, inputs)
            values = pool.of(found, inputs)
            losses |= _backward(tasks, [v.split(counts) for v in values], parts, distance)
    return losses


def _together(model: Surgery, parts: Mapping[str, Part]) -> Iterator[list[str]]:
    """Tasks that run in one forward pass."""
    inputs = [part.inputs for part in parts.values()]
    if not mixes_rows(model) and join(inputs) is not None:
        yield list(parts)
    else:
        yield from ([task] for task in parts)


def _ids(model: Surgery, tasks: Sequence[str], counts: Sequence[int]) -> Tensor:
    ids = torch.tensor([model.tasks.index(task) for task in tasks])
    return ids.repeat_interleave(torch.tensor(counts))


def _backward(
    tasks: Sequence[str],
    values: Sequence[Sequence[Tensor]],
    parts: Mapping[str, Part],
    distance: Callable,
) -> dict[str, float]:
    """Losses of tasks, from what is compared: a tensor a site and task."""
    losses = {
        task: sum(
            distance(site[k], target.to(site[k]))
            for site, target in zip(values, parts[task].targets, strict=True)
        )
        for k, task in enumerate(tasks)
    }
    sum(losses.values()).backward()
    return {task: float(loss.detach()) for task, loss in losses.items()}


def _read_once(model: Surgery, sources: Mapping[str, Source]) -> Step | None:
    """A step on representations that the merged model gave once; None where blocks lie between
    the adapters, rows are not known beforehand, or tokens would all have to be kept."""
    if len(model.sites) > 1 or any(source.targets is None for source in sources.values()):
        return None
    (site,) = model.sites
    encoder, adapters = model.encoder, model.adapters[0]

    def uncorrected(task: str, inputs: Any) -> list[Tensor]:
        with torch.no_grad(), selected(model, task), recording(encoder, [site]) as found:
            held, adapters.tasks = adapters.tasks, None
            try:
                call_model(model.model, inputs)
            finally:
                adapters.tasks = held
        return [found[site]]

    first = next(iter(sources))
    sample = sources[first].batches.at(torch.arange(1))
    if uncorrected(first, sample)[0].dim() > 2:
        return None
    own = {
        task: source.read(lambda inputs, task=task: uncorrected(task, inputs))[0]
        for task, source in sources.items()
    }

    def step(model: Surgery, parts: Mapping[str, Part], pool: Pool, distance: Callable):
        rows = [own[task][part.rows.to(own[task].device)] for task, part in parts.items()]
        counts = [len(r) for r in rows]
        with selected(model, _ids(model, list(parts), counts)):
            values = adapters(torch.cat(rows)).split(counts)
        return _backward(list(parts), [values], parts, distance)

    return step
