"""Joins the demo's JSON files of single seeds into one: python tools/join_seeds.py OUT SEED..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastmerge.demo.run import write_json
from fastmerge.report import spread

SAME = ("settings", "commit", "machine", "versions")


def joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What `fastmerge demo --seeds N --json` writes, from N runs of one seed each.

    Raises:
        ValueError: the runs differ in more than their seed.
    """
    for key in SAME:
        if any(run[key] != runs[0][key] for run in runs):
            raise ValueError(f"the runs differ in {key}: {[run[key] for run in runs]}")
    seeds = [rows for run in runs for rows in run["seeds"]]
    numbers = [rows[0]["seed"] for rows in seeds]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"a seed is there twice: {numbers}")
    return {
        "rows": seeds[0],
        "seeds": seeds,
        "spread": spread([row for rows in seeds for row in rows]),
        **{key: runs[0][key] for key in SAME},
        "seconds": sum(run["seconds"] for run in runs),
    }


if __name__ == "__main__":
    out, *files = map(Path, sys.argv[1:])
    write_json(out, joined([json.loads(file.read_text(encoding="utf-8")) for file in files]))
