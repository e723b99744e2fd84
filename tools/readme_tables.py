"""Writes the README's tables from the results in benches/results: python tools/readme_tables.py"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fastmerge.report import LABELS

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "pretrained": "pre-trained",
    "individual": "individual experts",
    "average": "average",
    "task_arithmetic": "task arithmetic, λ 0.3",
    "task_arithmetic_tuned": "task arithmetic, λ tuned",
    "ties": "TIES, λ 1",
    "ties_tuned": "TIES, λ tuned",
    "adamerging_task": "AdaMerging task-wise, entropy",
    "adamerging_layer": "AdaMerging layer-wise, entropy",
    "adamerging_pp": "AdaMerging++ layer-wise, entropy",
    "adamerging_layer_kl": "AdaMerging layer-wise, KL to the experts",
    "adamerging_layer_kl_bf16": "AdaMerging layer-wise, KL, learned in bf16",
    "emr": "EMR-Merging, task given",
    "tall": "TALL masks, task given",
    "twin": "Twin-Merging, routed",
    "wemoe": "WEMoE, routed",
}
RESULTS = ROOT / "benches" / "results"


def demo_table() -> str:
    """Mean accuracies over the seeds of benches/results/demo.json as a Markdown table."""
    found = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    tasks, seeds = found["settings"]["tasks"], found["seeds"]
    full = any(row["protocol"] == "paper" for row in seeds[0])
    lines = [
        f"| accuracy, % | {' | '.join(tasks)} | average | lowest to highest | MiB | ms |",
        "|---" * (len(tasks) + 5) + "|",
    ]
    for rows in zip(*seeds, strict=True):
        cells = [sum(r["accuracy"][task] for r in rows) / len(rows) for task in tasks]
        averages = [row["average"] for row in rows]
        numbers = " | ".join(f"{value:.1f}" for value in cells)
        mean = f"**{sum(averages) / len(averages):.1f}**"
        span = f"{min(averages):.1f} to {max(averages):.1f}"
        name = NAMES.get(rows[0]["method"], LABELS[rows[0]["method"]])
        name += " *" if rows[0]["protocol"] == "paper" else ""
        cost = " | ".join(_lowest(rows, key) for key in ("stored_mib", "batch_ms"))
        lines.append(f"| {name} | {numbers} | {mean} | {span} | {cost} |")
    commits = sorted({row["commit"] for rows in seeds for row in rows})
    command = f"fastmerge demo --seeds {len(seeds)}{' --full' if full else ''}"
    on_scored = " Rows with a * adapt on the scored rows, as in AdaMerging's paper." if full else ""
    lines += [
        "",
        f"Means over seeds 0 to {len(seeds) - 1} (`{command}`, commit {', '.join(commits)}),",
        "400 scored rows a task. Coefficients and tuned λ come from other rows, without labels.",
        "MiB: weights that serve all tasks; ms: 8 rows of each task in one batch, the lowest of",
        "the seeds, where measured.",
        f"The plain command runs seed 0.{on_scored}",
    ]
    return "\n".join(lines)


def _lowest(rows: Sequence[dict[str, float]], key: str) -> str:
    return f"{min(row[key] for row in rows):.0f}" if all(key in row for row in rows) else ""


def bench_table() -> str:
    """Every CPU measure of benches/results as a Markdown table: ratios, each of one run."""
    found = sorted(RESULTS.glob("*.csv"))
    path = next(p for p in found if "gpu" not in p.stem and not p.stem.startswith("jobs"))
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row["variant"] == row["of"]:
            continue
        more = f" ({float(row['peak_mib']):.0f} MiB)" if row["peak_mib"] else ""
        groups[row["measure"], row["case"], row["of"]].append(
            f"{row['variant']} {float(row['ratio']):.2f}{more}"
        )
    lines = ["| measure | case | ratio to | ratios |", "|---|---|---|---|"]
    lines += [
        f"| {measure} | {case} | {of} | {', '.join(ratios)} |"
        for (measure, case, of), ratios in groups.items()
    ]
    first, commits = rows[0], sorted({row["commit"] for row in rows})
    lines += [
        "",
        f"`fastmerge bench --device cpu`, {first['device']}, {first['threads']} threads, torch "
        f"{first['torch']}, commit {', '.join(commits)}.",
    ]
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The README's text with its tables renewed."""
    for name, table in (("demo", demo_table), ("bench", bench_table)):
        marked = rf"(<!-- {name} table -->\n).*?(<!-- /{name} table -->)"
        text = re.sub(marked, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
