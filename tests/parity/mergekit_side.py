"""Runs in mergekit's environment: merges state dicts by its in-memory interface.

Usage: python mergekit_side.py FOLDER. FOLDER/jobs.json lists jobs: {"method", "models", "base",
"parameters", "dtype", "out"}; models are safetensors files in FOLDER, the base among them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from mergekit.merge_methods.api import merge_state_dicts
from safetensors.torch import load_file, save_file


def main(folder: Path) -> None:
    for job in json.loads((folder / "jobs.json").read_text()):
        models = {name: load_file(folder / name) for name in job["models"]}
        torch.manual_seed(1234)  # of no stream that the inputs were drawn from
        with torch.no_grad():
            merged = merge_state_dicts(
                models,
                job["method"],
                parameters=job["parameters"],
                base=job["base"],
                dtype=getattr(torch, job["dtype"]),
            )
        tensors = {name: tensor.contiguous().clone() for name, tensor in merged.items()}
        save_file(tensors, folder / job["out"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
