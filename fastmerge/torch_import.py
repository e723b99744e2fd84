"""`import torch` for commands that run plain kernels once and end."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

# What tells compilers and tracers the shapes of results. Nobody asks in a merge job, and importing
# it with the decompositions that it needs is a fifth of torch's import.
UNUSED = "torch._meta_registrations"


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
