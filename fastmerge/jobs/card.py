"""The model card that a merge job writes beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .. import __version__
from .sources import Report


def model_card(
    title: str, method: str, text: str, hashes: Mapping[str, str], report: Report
) -> bytes:
    """README.md of the output: recipe, inputs with their hashes, versions, what became of what.

    Args:
        title: heading.
        method: the merge method's name.
        text: the recipe, or what takes its place.
        hashes: {model: hash of its headers, sizes and times}.
        report: what becomes of the inputs' tensors.
    """
    head = [
        "---",
        "library_name: transformers",
        "base_model:",
        *(f"- {json.dumps(_shown(model))}" for model in hashes),
        "tags:",
        "- merge",
        "- fastmerge",
        "---",
        f"# {' '.join(title.split())}",
        "",
        f"Merged by fastmerge {__version__} (torch {torch.__version__}) with method `{method}`.",
        "",
        "## Recipe",
        "",
        *_fenced(text),
        "",
        "## Inputs",
        "",
        "sha256 of headers, file sizes and times of modification.",
        "",
        "| model | sha256 |",
        "|---|---|",
        *(f"| {_shown(model)} | `{digest}` |" for model, digest in hashes.items()),
        "",
        "## Tensors",
        "",
        *(f"- {line}" for line in report.lines()),
    ]
    return ("\n".join(head) + "\n").encode()


def _shown(model: str) -> str:
    """A model's name without the folders it lies in, which are nobody's business."""
    return "+".join(Path(part).name or part for part in model.split("+"))


def _fenced(text: str) -> Iterable[str]:
    """A code block around any text, its fence longer than every fence in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return (f"{fence}yaml", text.rstrip(), fence)
