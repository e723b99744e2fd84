"""Where the CUDA kernels run: on a device, or emulated from their sources on any machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from fastmerge import _native
from fastmerge._native import cuda, extensions

from .emulated import build

CPU_KERNELS = _native.for_device(torch.device("cpu"))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Calls a function whose ops take the CPU kernels."""

    def call(run: Callable, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(_native, "for_device", lambda device: CPU_KERNELS)
            return run(*arguments)

    return call


@pytest.fixture(scope="session")
def emulated_extension() -> ModuleType:
    return build()


def cuda_reason() -> str:
    """Why no CUDA device can be tested; empty if one can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _native.cuda_unavailable_reason() or cuda.unavailable_reason(torch.device("cuda", 0))


@pytest.fixture
def cuda_device() -> torch.device:
    """A CUDA device that the compiled kernels run on."""
    if reason := cuda_reason():
        pytest.skip(reason)
    return torch.device("cuda", 0)


@pytest.fixture(params=["emulated", "emulated-reverse", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Device of the tensors; the functions of `_native.cuda` then take them."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda_device")
    extension = request.getfixturevalue("emulated_extension")
    monkeypatch.setenv("FASTMERGE_EMULATED_ORDER", request.param.partition("-")[2])
    monkeypatch.setattr(extensions, "cuda", extension)
    monkeypatch.setattr(cuda.calls, "multiprocessors", lambda index: 1)

    def place(tensor: torch.Tensor):
        return extension.Place(0, cuda.calls.multiprocessors(0), 0)

    monkeypatch.setattr(cuda.calls, "place", place)
    monkeypatch.setattr(_native, "for_device", lambda device: (cuda, ""))
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield
    torch.set_num_threads(threads)
