"""The models that keep their experts, whose forward passes over a mixed batch are measured."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import fastmerge as fm
from fastmerge.deltas import Deltas, Dense, LowRank
from fastmerge.modules.task_router import TaskRouter
from fastmerge.modules.twin import TwinMerging, is_matrix, rank_of

from .vision import TASKS

IMAGES_PER_TASK = 8


def mixed_ids() -> list[int]:
    """A task for each image, none beside its like."""
    return [i % TASKS for i in range(TASKS * IMAGES_PER_TASK)]


def _by_task(model: fm.modules.dynamic.DynamicModel) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(images: torch.Tensor) -> torch.Tensor:
        with fm.task(model, mixed_ids()):
            return model(images)

    return run


def _twin(base: torch.nn.Module) -> TwinMerging:
    """Twin-Merging at a tenth of the rank, with random factors: no time depends on their values."""
    generator = torch.Generator().manual_seed(1)

    def draw(like: torch.Tensor, *shape: int) -> torch.Tensor:
        return 1e-2 * torch.randn(shape, generator=generator).to(like)

    deltas: dict[str, Deltas] = {}
    for name, p in base.named_parameters():
        if is_matrix(p.shape):
            rank = rank_of(p.shape, 0.1)
            down = [draw(p, rank, *p.shape[1:]) for _ in range(TASKS)]
            deltas[name] = LowRank(down, [draw(p, len(p), rank) for _ in range(TASKS)])
        else:
            deltas[name] = Dense([draw(p, *p.shape) for _ in range(TASKS)])
    tasks = [f"task{k}" for k in range(TASKS)]
    twin = TwinMerging(copy.deepcopy(base), deltas, tasks, features=_tokens).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        twin.set_router(TaskRouter(len(base.norm.weight), tasks).to(base.norm.weight))
    return twin


def _tokens(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the head of the vision model reads."""
    return model.norm(model.blocks(model.patch(images).flatten(2).transpose(1, 2))).mean(1)


def _by_weights(model: TwinMerging) -> Callable[[torch.Tensor], torch.Tensor]:
    """All tasks in every sample, by weights that are there."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(TASKS * IMAGES_PER_TASK, TASKS, generator=generator).softmax(-1)

    def run(images: torch.Tensor) -> torch.Tensor:
        with model.select(weights.to(images)):
            return model(images)

    return run


def routed(base: nn.Module, experts: list[nn.Module], routing: str = "sample") -> nn.Module:
    """WEMoE with routers by which samples differ, as trained ones' do."""
    model = fm.build(base, experts, method="wemoe", routing=routing)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in model.routers:
            noise = torch.randn(router.weight.shape, generator=generator)
            router.weight.add_(noise.to(router.weight.device), alpha=0.1)
    return model


# {row of the results: how the base model and its experts become something to call with images}
ROWS: dict[str, Callable] = {
    "emr": lambda base, experts: _by_task(fm.build(base, experts, method="emr")),
    "tall": lambda base, experts: _by_task(fm.build(base, experts, method="tall")),
    "twin, one-hot": lambda base, experts: _by_task(_twin(base)),
    "twin, dense": lambda base, experts: _by_weights(_twin(base)),
    "twin, dense and its router": lambda base, experts: _twin(base),
    "wemoe": routed,
    "wemoe, batch mean": lambda base, experts: routed(base, experts, "batch"),
}
