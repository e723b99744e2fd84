"""The table's rows of merged models whose representations are corrected: Surgery, SurgeryV2."""

from __future__ import annotations

import fastmerge as fm

from .dynamic_rows import given_tasks_row
from .measure import measured
from .rows import Bench, Row


def surgery(bench: Bench, method: str) -> Row:
    """Adapters on task arithmetic, trained on the adapt rows; the sample's task is given.

    Args:
        bench: the shared parts.
        method: "surgery" or "surgery_v2", which is also the start of its settings' names.
    """
    settings = bench.settings
    steps, rate, size = (getattr(settings, f"{method}_{k}") for k in ("steps", "rate", "batch"))
    ids = bench.strict.ids
    batches = {name: fm.ShuffledBatches(rows, size, bench.seed) for name, rows in ids.items()}
    with measured() as merging:
        state = fm.merge(
            bench.base, bench.experts, method="task_arithmetic", scaling=settings.scaling
        )
    with bench.holding(state) as encoder:
        with measured() as cost:
            example = next(iter(ids.values()))[:2]
            model = fm.build(encoder, bench.experts, method=method, inputs=example, seed=bench.seed)
            fm.train_surgery(
                model, batches, bench.experts, steps=steps, lr=rate, mask=lambda ids: ids != 0,
                progress=False,
            )  # fmt: skip
        cost.seconds += merging.seconds
        row = given_tasks_row(bench, method, model, cost)
        model.remove()
    return row
