"""Which implementation of an op runs: native kernels, Triton kernels or the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from . import _native

BACKENDS = ("reference", "native", "triton")
NATIVE_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

_forced: ContextVar[str | None] = ContextVar("fastmerge_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend.

    Args:
        name: "reference" (plain PyTorch), "native" (compiled C++ or CUDA C++) or "triton".

    Raises:
        ValueError: the name is none of these.
        RuntimeError: inside the block, by an op that this backend cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """Name of the backend forced by `use_backend`, or None."""
    return _forced.get()


def runs_native(op: str, *tensors: torch.Tensor | None) -> bool:
    """Whether the CPU implementation of `op` should call its native kernel for these tensors.

    Raises:
        RuntimeError: a backend was forced that cannot run the op.
    """
    forced = _forced.get()
    if forced == "reference":
        return False
    if forced == "triton":
        raise RuntimeError(f"{op}: the triton backend has no CPU implementation")
    unsupported = {t.dtype for t in tensors if t is not None} - NATIVE_DTYPES
    if not unsupported and _native.available():
        return True
    if forced == "native":
        reason = (
            f"dtype {sorted(map(str, unsupported))[0]} is computed by the reference"
            if unsupported
            else _native.unavailable_reason()
        )
        raise RuntimeError(f"{op}: the native backend was forced but cannot run: {reason}")
    return False
