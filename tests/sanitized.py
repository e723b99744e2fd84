"""pytest plugin of tools/sanitize.py: the CPU kernels come from the file FASTMERGE_SANITIZED."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch  # noqa: F401  (before the kernels, so that both use the same OpenMP runtime)

PATH = os.environ["FASTMERGE_SANITIZED"]

_spec = importlib.util.spec_from_file_location("fastmerge._cpu", PATH)
sys.modules["fastmerge._cpu"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["fastmerge._cpu"])


def pytest_sessionstart() -> None:
    from fastmerge._native import extensions

    assert extensions.cpu is not None and extensions.cpu.__file__ == PATH, extensions.cpu_reason
