"""Which implementation of an op runs: native kernels, Triton kernels or the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from . import _native

BACKENDS = ("reference", "native", "triton")
NATIVE_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

_forced: ContextVar[str | None] = ContextVar("fastmerge_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend.

    Args:
        name: "reference" (plain PyTorch), "native" (compiled C++ or CUDA C++) or "triton"; ops
            that have no Triton kernel then run as usual.

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


def native_kernels(op: str, *tensors: torch.Tensor | None) -> ModuleType | None:
    """The module of compiled kernels that should run `op` on these tensors, None: the reference.

    Args:
        op: the op, or the name for error messages of several kernels' user.
        tensors: the arguments; None entries are skipped. The first gives the device.

    Raises:
        RuntimeError: the native backend was forced and cannot run the op.
    """
    forced = _forced.get()
    if forced == "reference":
        return None
    given = [t for t in tensors if t is not None]
    dtypes = {t.dtype for t in given}
    if not dtypes <= NATIVE_DTYPES:
        unsupported = min(str(dtype) for dtype in dtypes - NATIVE_DTYPES)
        kernels, reason = None, f"dtype {unsupported} is computed by the reference"
    else:
        kernels, reason = _native.for_device(given[0].device)
        if kernels is not None and hasattr(_native.cpu, op) and not hasattr(kernels, op):
            kernels, reason = None, f"it has no {given[0].device.type} kernel"
    if kernels is None and forced == "native":
        raise RuntimeError(f"{op}: the native backend was forced but cannot run: {reason}")
    return kernels


def triton_kernels(
    function: str,
    tensors: Mapping[str, torch.Tensor | None],
    deltas: Sequence[torch.Tensor] | None = None,
) -> ModuleType | None:
    """The package of Triton kernels if its launcher `function` should run, else None.

    CPU tensors take it only where it is forced and Triton interprets (TRITON_INTERPRET=1).

    Args:
        function: name of the launcher in `fastmerge.kernels`.
        tensors: its tensor arguments by name, activations or logits first.
        deltas: its K deltas.

    Raises:
        RuntimeError: the Triton backend was forced and cannot run the op.
    """
    forced = _forced.get()
    on_gpu = next(iter(tensors.values())).is_cuda
    if forced in ("reference", "native") or not (on_gpu or forced == "triton"):
        return None
    from . import kernels  # here, so that the CPU never looks for Triton

    able, reason = kernels.supports(function, tensors, deltas)
    if not able and forced == "triton":
        raise RuntimeError(f"the triton backend was forced but cannot run: {reason}")
    return kernels if able else None
