"""Writes the README's tables from the results in benches/results: python tools/readme_tables.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "pretrained": "pre-trained",
    "individual": "individual experts",
    "average": "average",
    "task_arithmetic": "task arithmetic, λ 0.3",
    "task_arithmetic_tuned": "task arithmetic, λ tuned",
    "ties": "TIES, λ 1",
    "ties_tuned": "TIES, λ tuned",
    "adamerging_layer": "AdaMerging layer-wise, entropy",
    "adamerging_layer_kl": "AdaMerging layer-wise, KL to the experts",
}


def demo_table() -> str:
    """Mean accuracies over the seeds of benches/results/demo.json as a Markdown table."""
    found = json.loads((ROOT / "benches" / "results" / "demo.json").read_text(encoding="utf-8"))
    tasks, seeds = found["settings"]["tasks"], found["seeds"]
    lines = [
        f"| accuracy, % | {' | '.join(tasks)} | average | lowest to highest |",
        "|---" * (len(tasks) + 3) + "|",
    ]
    for rows in zip(*seeds, strict=True):
        cells = [sum(r["accuracy"][task] for r in rows) / len(rows) for task in tasks]
        averages = [row["average"] for row in rows]
        numbers = " | ".join(f"{value:.1f}" for value in cells)
        mean = f"**{sum(averages) / len(averages):.1f}**"
        span = f"{min(averages):.1f} to {max(averages):.1f}"
        lines.append(f"| {NAMES[rows[0]['method']]} | {numbers} | {mean} | {span} |")
    lines += [
        "",
        f"Means over seeds 0 to {len(seeds) - 1} (`fastmerge demo --seeds {len(seeds)}`, commit "
        f"{found['commit']}), 400 scored rows",
        "a task. Coefficients and tuned λ were found on other rows, without labels. The plain",
        "command runs seed 0.",
    ]
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The README's text with its tables renewed."""
    marked = r"(<!-- demo table -->\n).*?(<!-- /demo table -->)"
    return re.sub(marked, lambda m: f"{m[1]}{demo_table()}\n{m[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
