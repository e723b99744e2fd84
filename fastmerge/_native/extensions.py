"""The compiled extension modules, or the reasons why they are missing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (before the extensions, so that both use the same OpenMP runtime)

PACKAGE = Path(__file__).resolve().parent.parent


def build_info() -> dict[str, dict[str, object]]:
    """What the installation built: part -> {"built": bool, "reason": str, ...}; may be empty."""
    try:
        return json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"fastmerge.{name}"), ""
    except ImportError as error:
        part = build_info().get(f"fastmerge.{name}", {})
        if part.get("reason"):
            return None, f"not built: {part['reason']}"
        return None, str(error) if part else "not built"


cpu, cpu_reason = _load("_cpu")
cuda, cuda_reason = _load("_cuda")
