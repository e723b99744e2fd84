"""The table's rows of merged models that keep their experts: masks, low-rank parts, routed MLPs."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastmerge as fm

from ..objectives import Batch, kl_to_expert
from .evaluate import accuracy, embed
from .measure import Cost, measured
from .rows import Adaptation, Bench, Row, record
from .serving import held_bytes


def emr(bench: Bench) -> Row:
    """EMR-Merging: no data, no training; the sample's task is given."""
    with measured() as cost:
        model = _build(bench, "emr")
    return given_tasks_row(bench, "emr", model, cost)


def tall(bench: Bench) -> Row:
    """TALL masks; each task's threshold is the one its adapt rows prefer by divergence from the
    expert's predictions. The sample's task is given."""
    adaptation = bench.strict
    adaptation.prepare()
    with measured() as cost:
        model = _build(bench, "tall", score=lambda made, task: -_divergence(adaptation, made, task))
    cost.seconds += adaptation.expert_cost.seconds
    return given_tasks_row(bench, "tall", model, cost)


def twin(bench: Bench) -> Row:
    """Twin-Merging: a router trained on the adapt rows' tasks mixes low-rank parts; no task ids."""
    settings = bench.settings
    with measured() as cost:
        model = _build(bench, "twin")
        batches = {name: ids.split(settings.router_batch) for name, ids in bench.strict.ids.items()}
        fm.train_router(
            model, batches, epochs=settings.router_epochs, batch_size=settings.router_batch,
            seed=bench.seed,
        )  # fmt: skip
    weights = {
        name: torch.cat([model.weights(ids) for ids in split.ids.split(64)])
        for name, split in bench.scored.items()
    }
    tasks = list(weights)
    hits = [
        float((rows.argmax(1) == tasks.index(name)).double().mean())
        for name, rows in weights.items()
    ]
    routing = torch.stack([rows.mean(0) for rows in weights.values()])
    more = {"router_accuracy": 100 * statistics.fmean(hits)}
    return _row(bench, "twin", model, cost, more, routing)


def wemoe(bench: Bench) -> Row:
    """WEMoE: routers in front of the MLPs, learned like coefficients by KL; no task ids."""
    settings, adaptation = bench.settings, bench.strict
    adaptation.prepare()
    with measured() as cost:
        model = _build(bench, "wemoe")
        fm.learn(
            model, model.routers, adaptation.batches(), heads=bench.heads, objective="kl",
            expert_logits=adaptation.lookups, steps=settings.adapt_steps, lr=settings.router_rate,
        )  # fmt: skip
    cost.seconds += adaptation.expert_cost.seconds
    means = [model.coefficients_of(split.ids.split(64)).mean(0) for split in bench.scored.values()]
    return _row(bench, "wemoe", model, cost, {"objective": "kl"}, torch.stack(means))


def tact(bench: Bench) -> Row:
    """TACT on task arithmetic: moments of the adapt rows. The sample's task is given."""
    settings = bench.settings
    with measured() as cost:
        merged = copy.deepcopy(bench.encoder)
        state = fm.merge(
            bench.base, bench.experts, method="task_arithmetic", scaling=settings.scaling
        )
        merged.load_state_dict(state, strict=False)
        inputs = {name: ids[: settings.tune_rows] for name, ids in bench.strict.ids.items()}
        model = fm.build(
            merged, bench.experts, method="tact", inputs=inputs, mask=lambda ids: ids != 0
        )
    return given_tasks_row(bench, "tact", model, cost, model.nbytes())


def _build(bench: Bench, method: str, **options: Any) -> Any:
    def unmerged(name: str) -> bool:
        return name not in bench.base

    return fm.build(bench.encoder, bench.experts, method=method, exclude=unmerged, **options)


@torch.no_grad()
def _divergence(adaptation: Adaptation, model: nn.Module, task: str) -> float:
    rows = adaptation.bench.settings.tune_rows
    ids, target = adaptation.ids[task][:rows], adaptation.expert_logits[task][:rows]
    logits = adaptation.bench.heads[task](embed(model, ids))
    return float(kl_to_expert(logits, Batch(task, ids, target)))


def given_tasks_row(bench: Bench, method: str, model: Any, cost: Cost, buffers: int = 0) -> Row:
    """Scored with the task of every row given; `buffers` bytes are stored beside parameters."""
    result = {}
    for name, split in bench.scored.items():
        with fm.task(model, name):
            result[name] = accuracy(model, bench.heads[name], split)

    def serve() -> None:
        with fm.task(model, bench.mixed.tasks):
            model(bench.mixed.ids)

    serving = bench.serving(serve, held_bytes(model) + buffers)
    return Row(record(bench, method, result, cost, **serving))


def _row(
    bench: Bench,
    method: str,
    model: Any,
    cost: Cost,
    more: Mapping[str, Any],
    routing: Tensor,
) -> Row:
    """Scored without telling which task a row belongs to."""
    result = {
        name: accuracy(model, bench.heads[name], split) for name, split in bench.scored.items()
    }
    serving = bench.serving(lambda: model(bench.mixed.ids), held_bytes(model))
    return Row(record(bench, method, result, cost, **more, **serving), routing=routing)
