"""`fastmerge demo`: experts, merges, one table, plots and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastmerge as fm

from .. import report
from ..info import commit, device_name
from . import experts, rows, tasks
from .data import Wheels
from .model import head, load_encoder, load_tokenizer, merged_state
from .plan import Planned, plan
from .settings import Settings

_BEST = {"learned": "learned", "static": "static", "dynamic": "that keeps its experts"}
_ONE_ROW = ("adamerging_task", "self_positioning")  # of coefficients: nothing to map


def main(
    out: Path = Path("demo-results"),
    data: Path = Path(".demo"),
    json_path: Path | None = None,
    full: bool = False,
    quick: bool = False,
    seeds: int = 1,
    seed: int = 0,
    threads: int | None = None,
    methods: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Run the demo: train or reuse experts, merge them in every way, print and plot the results.

    Args:
        out: folder for the plots.
        data: folder with wheels/ (the pinned data); the unpacked model and the experts are kept
            beside it.
        json_path: file to write all rows to.
        full: also task-wise and trimmed coefficients, and the paper's protocol.
        quick: a small run that checks the whole path; its accuracies mean nothing.
        seeds: how many seeds to run; more than one adds a table of mean and spread.
        seed: the first seed; the main table and the plots are this seed's.
        threads: CPU threads, or torch's default.
        methods: only the rows of these methods, whichever `full` says.

    Returns:
        The rows of the first seed, as in the JSON file's `rows`.

    Raises:
        ValueError: there is no row of such a method, or no seed.
        DemoDataError: the data folder or a wheel is missing or not the pinned one.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    begun = time.perf_counter()
    settings = Settings.quick() if quick else Settings()
    planned = plan(settings, full, methods)
    console, log = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = 110  # a file has no width of its own
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with Wheels(data) as wheels:
            runs = []
            for number in range(seed, seed + seeds):
                bench = prepare(wheels, settings, number, log)
                runs.append(run_rows(bench, planned, log))
    finally:
        torch.set_num_threads(before)
    records = [[row.record for row in run] for run in runs]
    console.print(report.accuracy_table(records[0], f"seed {seed}"))
    for note in describe(records[0], settings):
        console.print(note, highlight=False)
    if quick:
        console.print("quick: a check of the whole path; these accuracies mean nothing.")
    summary = report.spread([record for run in records for record in run])
    if seeds > 1:
        console.print(report.spread_table(summary, f"seeds {seed} to {seed + seeds - 1}"))
    files = plot(runs[0], settings, out)
    if json_path is not None:
        content = {
            "rows": records[0],
            "seeds": records,
            "spread": summary,
            "settings": vars(settings),
            "commit": commit(),
            "machine": f"{device_name(torch.device('cpu'))}, {threads or before} threads",
            "versions": _versions(),
            "seconds": time.perf_counter() - begun,
        }
        write_json(json_path, content)
        files.append(json_path)
    console.print(f"wrote {', '.join(str(file) for file in files)}", highlight=False)
    console.print(f"{time.perf_counter() - begun:.0f} s in all", highlight=False)
    return records[0]


def prepare(wheels: Wheels, settings: Settings, seed: int, log: Console) -> rows.Bench:
    """Load the encoder and the tasks, and get every expert from its file or from training."""
    folder = wheels.model_folder()
    tokenizer, encoder = load_tokenizer(folder), load_encoder(folder)
    loaded = {name: tasks.load(name, wheels, tokenizer, settings, seed) for name in settings.tasks}
    heads = {name: head(encoder, tokenizer, task.task, settings) for name, task in loaded.items()}
    cache = wheels.folder / "cache" / experts.fingerprint(encoder, loaded, settings, seed)
    states = {}
    begun = time.perf_counter()
    with _progress(log, "experts", len(loaded) * settings.expert_steps) as advance:
        for name, task in loaded.items():
            expert = experts.obtain(encoder, task, heads[name], settings, seed, cache, advance)
            states[name] = expert.state
            if expert.reused:
                advance(settings.expert_steps)
    log.print(f"{len(states)} experts, seed {seed}: {time.perf_counter() - begun:.1f} s")
    return rows.Bench(encoder, merged_state(encoder), states, heads, loaded, settings, seed)


def run_rows(bench: rows.Bench, planned: Sequence[Planned], log: Console) -> list[rows.Row]:
    """Every row of one seed, reported on `log` as it is finished."""
    finished = []
    source = commit()
    for one in planned:
        row = one.make(bench)
        record = row.record
        record["commit"] = source
        log.print(
            f"{report.label(record)}, {record['protocol']}: {record['average']:.1f} %, "
            f"{record['seconds']:.1f} s",
            highlight=False,
        )
        for message in record.get("warnings", ()):
            log.print(f"  warning: {message}", style="yellow", highlight=False)
        finished.append(row)
    return finished


def describe(records: Sequence[Mapping[str, Any]], settings: Settings) -> list[str]:
    """The lines below the table: how rows came about, and what they show."""
    top = max(records, key=lambda record: record["average"])
    lines = [
        f"{settings.test_rows} scored rows a task: the standard error of a mean is "
        f"{report.standard_error(top, settings.test_rows):.1f} points.",
        f"strict: adapted on {settings.adapt_rows} other unlabelled rows a task; paper: on the "
        "scored rows, without labels.",
        f"tuned: λ with the lowest {settings.tune_objective.upper()} objective on "
        f"{settings.tune_rows} of the same adapt rows a task.",
        "KL: learned by divergence from the experts' predictions instead of by entropy.",
        "seconds: merging or learning, scoring left out; MiB: the process's peak memory meanwhile.",
        "stored: MiB of weights that serve all tasks; ms: a forward pass of "
        f"{settings.mixed_rows} rows of each task in one batch.",
    ]
    best = _best(records)
    lines += [
        f"Best {name} {best[kind]['average']:.1f} ({report.label(best[kind])})."
        for kind, name in _BEST.items()
        if kind in best
    ]
    if "dynamic" in best:
        lines.append(
            "Twin-Merging and WEMoE route by the row itself; the other rows that keep something of "
            "each expert are told the task."
        )
    lines += [
        f"{report.label(record)}: other experts, adapters that reach {record['experts']:.1f} each "
        "on its own task."
        for record in records
        if report.kind(record["method"]) == "adapters"
    ]
    collapsed = [record for record in records if "warnings" in record]
    lines += [
        f"{report.label(record)}: predictions collapsed on a task, see the warning above."
        for record in collapsed
    ]
    return lines


def plot(run: Sequence[rows.Row], settings: Settings, out: Path) -> list[Path]:
    """Write the bar chart, the learning curves, a heat map for each layer-wise learned row, and
    where routers send each task's rows."""
    strict = [row for row in run if row.record["protocol"] == "strict"]
    curves = [row.curve for row in strict if row.curve is not None]
    records, bars = [row.record for row in strict], out / "accuracies.png"
    files = [report.bar_chart(records, bars, "accuracy on held-out rows")]
    if curves:
        title = (
            f"learning on unlabelled rows; accuracy on {settings.curve_rows} scored rows a task, "
            "for display only"
        )
        files.append(report.learning_curves(curves, out / "curves.png", title))
    for row in strict:
        if row.routing is not None:
            method = row.record["method"]
            title = f"{report.LABELS[method]}: weight of each expert on the scored rows of a task"
            if "router_accuracy" in row.record:
                title += (
                    f"\nthe right task is the likeliest on {row.record['router_accuracy']:.1f} %"
                )
            file = out / f"routing-{method}.png"
            files.append(report.routing(row.routing, settings.tasks, file, title))
        if row.coefficients is not None and row.record["method"] not in _ONE_ROW:
            matrix, names = row.coefficients
            method = row.record["method"]
            title = f"{report.LABELS[method]}: coefficients of each tensor"
            file = out / f"coefficients-{method}.png"
            files.append(report.heat_map(matrix, names, settings.tasks, file, title))
    return files


def write_json(path: Path, content: Any) -> None:
    """Write JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _best(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """{kind: its row with the highest average}, of those that adapt on other rows."""
    best: dict[str, Mapping[str, Any]] = {}
    for record in records:
        kind = report.kind(record["method"])
        if record["protocol"] == "strict":
            best[kind] = max(best.get(kind, record), record, key=lambda row: row["average"])
    return best


def _versions() -> dict[str, str]:
    import transformers

    return {
        "fastmerge": fm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@contextmanager
def _progress(log: Console, what: str, total: int) -> Iterator[Any]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=log, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps=1: bar.advance(task, steps)
