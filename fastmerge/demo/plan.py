"""Which rows the demo's table has, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .dynamic_rows import emr, tall, twin, wemoe
from .rows import Bench, Row, individual, learned, pretrained, static, tuned
from .settings import Settings


def plan(settings: Settings, full: bool) -> list[Callable[[Bench], Row]]:
    """The table's rows in order, each as a function of the shared parts."""
    pp = {"method": "ties", "density": settings.ties_density}
    ties = {"density": settings.ties_density, "scaling": settings.ties_scaling, "merge": "mean"}
    rows: list[Callable[[Bench], Row]] = [
        pretrained,
        individual,
        lambda bench: static(bench, "average"),
        lambda bench: static(bench, "task_arithmetic", scaling=settings.scaling),
        lambda bench: tuned(bench, "task_arithmetic"),
        lambda bench: static(bench, "ties", **ties),
        lambda bench: tuned(bench, "ties"),
    ]
    kinds: dict[str, dict[str, Any]] = {
        "adamerging_task": {"granularity": "task"},
        "adamerging_layer": {},
        "adamerging_pp": {"trim": pp},
        "adamerging_layer_kl": {"objective": "kl"},
        "adamerging_layer_kl_bf16": {"objective": "kl", "dtype": torch.bfloat16},
    }
    default = ("adamerging_layer", "adamerging_layer_kl")
    for protocol in ("strict", "paper") if full else ("strict",):
        for method, options in kinds.items():
            if full or method in default:
                rows.append(
                    lambda bench, m=method, o=options, p=protocol: learned(
                        bench, m, protocol=p, **o
                    )
                )
        if full and protocol == "strict":
            rows += [emr, tall, twin, wemoe]
    return rows
