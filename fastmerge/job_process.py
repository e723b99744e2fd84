"""How a process is set up that runs one merge job and ends."""

from __future__ import annotations

import ctypes
import importlib
import sys
from types import ModuleType
from typing import Any

# What tells compilers and tracers the shapes of results. Nobody asks in a merge job, and importing
# it with the decompositions that it needs is a fifth of torch's import.
UNUSED = "torch._meta_registrations"

# glibc's mallopt: its numbers for two settings, and the largest block that its heaps take.
TRIM_THRESHOLD, MMAP_THRESHOLD, LARGEST_BLOCK = -1, -3, 32 << 20


class Postponed(ModuleType):
    """Stands for a module that is imported when something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what those look for who walk over all modules
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def import_torch() -> None:
    """Import torch, if it is not there yet, without the rules by which shapes are traced."""
    if "torch" not in sys.modules:
        sys.modules[UNUSED] = Postponed(UNUSED)
        importlib.import_module("torch")


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next block, if it is glibc.

    It would return blocks of some megabytes to the system, which fills the next ones with zeros
    page by page: half a second of `sce` over five models of 1 GB.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(MMAP_THRESHOLD, LARGEST_BLOCK)
    mallopt(TRIM_THRESHOLD, 8 * LARGEST_BLOCK)
