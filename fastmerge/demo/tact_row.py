"""The table's row of a merged model whose activations get each expert's moments: TACT."""

from __future__ import annotations

from torch import Tensor

import fastmerge as fm

from .evaluate import accuracy
from .measure import measured
from .rows import Bench, Row, record
from .serving import held_bytes


def tact(bench: Bench) -> Row:
    """Task arithmetic, corrected by moments on the adapt rows; the sample's task is given."""
    settings = bench.settings
    with measured() as cost:
        state = fm.merge(
            bench.base, bench.experts, method="task_arithmetic", scaling=settings.scaling
        )
        with bench.holding(state) as encoder:
            model = fm.build(
                encoder, bench.experts, method="tact", inputs=bench.strict.ids, mask=_words
            )
            try:
                with cost.paused():
                    result = {}
                    for name, split in bench.scored.items():
                        with fm.task(model, name):
                            result[name] = accuracy(model, bench.heads[name], split)

                    def serve() -> None:
                        with fm.task(model, bench.mixed.tasks):
                            model(bench.mixed.ids)

                    serving = bench.serving(serve, held_bytes(model) + model.nbytes())
            finally:
                model.remove()
    return Row(record(bench, "tact", result, cost, scaling=settings.scaling, **serving))


def _words(ids: Tensor) -> Tensor:
    """Which tokens are no padding."""
    return ids != 0
