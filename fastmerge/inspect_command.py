"""What `fastmerge inspect` does: measure, print tables, write JSON and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .jobs.places import find_place
from .jobs.recipe import read_model_name

if TYPE_CHECKING:
    from .jobs.inspection import Inspection


def run_inspect(
    base: str, experts: Sequence[str], *, json_path: Path | None, plot: Path | None
) -> None:
    """Compare experts with their base model.

    Args:
        base: its folder.
        experts: their folders, adapters, or `folder+adapter`.
        json_path: file to write all numbers to.
        plot: PNG file to write.

    Raises:
        ValueError: a folder or checkpoint that cannot be read.
    """
    anchor = read_model_name(base, "base")
    names = [read_model_name(expert, f"expert {k + 1}") for k, expert in enumerate(experts)]
    if len(set(names)) < len(names):
        raise ValueError(f"experts: one is given twice in {', '.join(experts)}")
    parts = [n for m in (anchor, *names) for n in (m.folder, m.adapter) if n is not None]
    folders = {part: find_place(part) for part in parts}
    from .inspect_plot import plot_inspection  # only now, since these import torch
    from .jobs.inspection import inspect_models
    from .jobs.models import open_models
    from .report import load_pyplot

    if plot is not None:
        try:
            load_pyplot()
        except RuntimeError as error:
            raise ValueError(error) from error
    models = open_models([anchor, *names], folders, anchor)
    found = inspect_models(models[anchor], [models[name] for name in names])
    from rich.console import Console

    console = Console()
    labels = short_names(found.experts)
    for table in (expert_table(found, labels), *layer_tables(found, labels)):
        console.print(table)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(found.as_json(), indent=2, allow_nan=False) + "\n")
    if plot is not None:
        plot_inspection(found, labels, plot)


def short_names(names: Sequence[str]) -> list[str]:
    """Last parts of paths where they tell models apart, else the paths."""
    short = [Path(name.rstrip("/")).name or name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def expert_table(found: Inspection, labels: Sequence[str]) -> Any:
    """A `rich` table with a line for each expert: norms, changed entries, cosines, conflicts."""
    from rich import box
    from rich.table import Table

    table = Table(title="task vectors", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("expert")
    for column in ("norm", "relative", "changed", *(f"cos {label}" for label in labels)):
        table.add_column(column, justify="right")
    total = found.total
    cosines = total.cosines().tolist()
    rows = zip(labels, total.norms(), total.relative_norms(), total.changed(), cosines, strict=True)
    for label, norm, relative, changed, row in rows:
        shown = [f"{norm:.4g}", f"{relative:.2e}", f"{changed:.1%}", *map(_cosine, row)]
        table.add_row(label, *shown)
    if len(labels) > 1:
        table.caption = f"signs conflict in {total.conflict():.1%} of {total.entries:,} entries"
    return table


def layer_tables(found: Inspection, labels: Sequence[str]) -> list[Any]:
    """`rich` tables with a line for each layer: relative norms, mean cosine, sign conflicts."""
    from rich import box
    from rich.table import Table

    tables = []
    for stack, measures in found.layers.items():
        if not measures:
            continue
        table = Table(title=f"layers {stack}N", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("layer", *labels, "mean cos", "conflict"):
            table.add_column(column, justify="right")
        for layer, measure in enumerate(measures):
            norms = [f"{norm:.2e}" for norm in measure.relative_norms()]
            conflict = f"{measure.conflict():.1%}"
            table.add_row(str(layer), *norms, _cosine(measure.mean_cosine()), conflict)
        table.caption = "norms of the task vectors relative to the base model's"
        tables.append(table)
    return tables


def _cosine(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
