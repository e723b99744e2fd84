"""The table's rows of another set of experts: adapters, trained as LoRA or linearised, then merged.

Both take the same rows, steps and starts as the whole experts; each has a learning rate of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

import fastmerge as fm

from ..linearized.adapters import Linearized
from .evaluate import accuracies, accuracy
from .experts import fit, task_seed
from .measure import measured
from .rows import Bench, Row, State, record

_TARGETS = ("attention.self.query", "attention.self.value")


def lora(bench: Bench) -> Row:
    """Task arithmetic of the factors A and B of LoRAs."""
    return _row(bench, "lora_tuned", linear=False)


def llora(bench: Bench) -> Row:
    """The same of L-LoRAs, where it is linear in the scaling at every layer: A never moves."""
    return _row(bench, "llora_tuned", linear=True)


def _row(bench: Bench, method: str, linear: bool) -> Row:
    """At the scaling that the unlabelled adapt rows prefer, as for task arithmetic.

    The record has the adapters' own mean accuracy as "experts". Training is left out of the
    seconds, as it is for experts that are whole models.
    """
    settings = bench.settings
    adapters = train_adapters(bench, linear)
    states = {name: adapters.weights(bench.base, [name], 1.0) for name in bench.tasks}
    own = []
    for name, state in states.items():
        with bench.holding(state) as encoder:
            own.append(accuracy(encoder, bench.heads[name], bench.scored[name]))
    adaptation = replace(bench, experts=states).strict
    if settings.tune_objective == "kl":
        adaptation.prepare()
    with measured() as cost:

        def loss(scaling: float) -> float:
            with bench.holding(adapters.weights(bench.base, bench.tasks, scaling)):
                return adaptation.loss(settings.tune_objective, settings.tune_rows)

        best = min(settings.lora_grid, key=loss)
        merged = adapters.weights(bench.base, bench.tasks, best)
        with cost.paused(), bench.holding(merged) as encoder:
            result = accuracies(encoder, bench.heads, bench.scored)
            serving = bench.serving_one_model
    cost.seconds += adaptation.expert_cost.seconds
    more = {"scaling": best, "objective": settings.tune_objective, **serving}
    return Row(record(bench, method, result, cost, experts=statistics.fmean(own), **more))


@dataclass
class Adapters:
    """The adapters of all tasks.

    Attributes:
        start: {layer: A0 [r, I]}; B0 is 0.
        factors: {task: {layer: (A [r, I], B [O, r])}}.
        scaling: s.
    """

    start: dict[str, Tensor]
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]]
    scaling: float

    def weights(self, base: State, tasks: Collection[str], scaling: float) -> State:
        """The adapted weights W + s B A with A = A0 + scaling sum_t (A_t - A0), B likewise."""
        merged = {}
        for layer, start in self.start.items():
            pairs = [self.factors[task][layer] for task in tasks]
            down = start + scaling * sum(a - start for a, _ in pairs)
            up = scaling * sum(b for _, b in pairs)
            weight = f"{layer}.weight"
            merged[weight] = base[weight] + self.scaling * (up @ down)
        return merged


def train_adapters(bench: Bench, linear: bool) -> Adapters:
    """An adapter of each task, from one start; the encoder itself is left as it was."""
    settings, encoder = bench.settings, bench.encoder
    linearized = fm.linearize(
        encoder, _TARGETS, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=bench.seed
    )
    start = {name: layer.start_down.clone() for name, layer in linearized.layers.items()}
    scaling = settings.lora_alpha / settings.lora_rank
    factors = {}
    try:
        for task, rows in bench.tasks.items():
            with _trainable(encoder, start, scaling, linear, linearized) as pairs:
                rate = settings.llora_rate if linear else settings.lora_rate
                trained = [p for pair in pairs.values() for p in pair if p.requires_grad]
                fit(
                    encoder, trained, rate, rows.train, bench.heads[task], settings,
                    task_seed(task, bench.seed),
                )  # fmt: skip
                factors[task] = {
                    layer: (a.detach().clone(), b.detach().clone())
                    for layer, (a, b) in pairs.items()
                }
    finally:
        linearized.remove()
    return Adapters(start, factors, scaling)


@contextmanager
def _trainable(
    encoder: nn.Module,
    start: dict[str, Tensor],
    scaling: float,
    linear: bool,
    linearized: Linearized,
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """{layer: (A, B)} at their start, part of the encoder for the duration of the body.

    LoRAs act beside the linearised adapters, which stay at their start and add nothing.
    """
    if linear:
        yield {name: (start[name], layer.up) for name, layer in linearized.layers.items()}
        linearized.reset()
        return
    pairs, hooks = {}, []
    try:
        for name, down in start.items():
            layer = encoder.get_submodule(name)
            pair = (
                nn.Parameter(down.clone()),
                nn.Parameter(down.new_zeros(layer.out_features, len(down))),
            )

            def add(layer, arguments, output, pair=pair):
                return output + F.linear(F.linear(arguments[0], pair[0]), pair[1]) * scaling

            pairs[name] = pair
            hooks.append(layer.register_forward_hook(add))
        yield pairs
    finally:
        for hook in hooks:
            hook.remove()
