"""What a machine without a GPU can prove about the CUDA kernels' code, and how absence is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastmerge import _native
from fastmerge._native import cuda, extensions

from .gpu.emulated import ROOT, build, native_build

SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
STREAMING = [name for name in SOURCES if name != "device_info.cu"]
ARCHS = ["8.0", "9.0", "10.0+PTX"]


@pytest.fixture(scope="module")
def tools() -> ModuleType:
    return native_build()


@pytest.fixture(scope="module")
def nvcc(tools: ModuleType) -> tuple[list[str], list[str]]:
    """The command of the build without architectures, and those that nvcc knows."""
    found = tools.find_nvcc()
    if found is None:
        pytest.skip("nvcc not found")
    known = subprocess.run([found, "--list-gpu-arch"], text=True, capture_output=True, check=True)
    flags, _ = tools.cuda_archs(";".join(ARCHS), known.stdout.split())
    return tools.nvcc_command(found, tools.find_cxx()), flags


def compiled(command: list[str], source: str, *flags: str) -> str:
    """What the compiler says; fails with it."""
    path = ROOT / "csrc" / "cuda" / source
    result = subprocess.run([*command, *flags, str(path)], text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills(nvcc, source: str, tmp_path: Path) -> None:
    """What does not fit into registers goes to memory and costs a streaming kernel bandwidth."""
    command, archs = nvcc
    output = ["-o", str(tmp_path / "kernels.o")]
    report = compiled(command, source, "-c", *archs, "-Xptxas", "-v", "--threads", "2", *output)
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    memory = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    machine_codes = sum("code=sm" in flag for flag in archs)
    assert len(kernels) == len(memory) > 0
    assert len({arch for _, arch in kernels}) == machine_codes
    spilled = [
        kernel for kernel, bytes_ in zip(kernels, memory, strict=True) if any(map(int, bytes_))
    ]
    assert not spilled


@pytest.mark.parametrize("source", STREAMING)
def test_rounding_and_access_width(nvcc, source: str, tmp_path: Path) -> None:
    """No fused multiply-add, so that bytes equal the CPU's; 16 bytes an access; 64-bit indices."""
    command, _ = nvcc
    output = tmp_path / "kernels.ptx"
    compiled(command, source, "-ptx", "-arch=compute_80", "-o", str(output))
    ptx = output.read_text()
    assert "ld.global.nc.v4" in ptx
    assert not re.search(r"\b(fma|mad)\.rn\.f(32|64)", ptx)
    assert not re.search(r"\.(ftz|approx)\b", ptx)
    if source in ("weighted_sum.cu", "combine_and_dot.cu", "ties.cu"):
        assert "st.global.v4" in ptx


def test_kernels_are_only_launched_in_one_place() -> None:
    """The launch header's stand-in in the emulation must see every launch; none may allocate."""
    for path in (ROOT / "csrc" / "cuda").iterdir():
        text = path.read_text()
        assert "<<<" not in text, path
        assert not re.search(r"cudaMalloc|cudaFree|Synchronize|\bthrow\b|new ", text), path


def run_python(code: str, **environ: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_import_without_devices_tells_the_reason() -> None:
    if extensions.cuda is None:
        pytest.skip(_native.cuda_unavailable_reason())
    code = (
        "from fastmerge import _native as n; import torch\n"
        "print(n.cuda_unavailable_reason())\n"
        "print(*n.for_device(torch.device('cuda', 0)))"
    )
    reason, found = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert reason.startswith(("no CUDA", "cudaErrorNoDevice"))
    assert found == f"None {reason}"


REASONS = {
    "FASTMERGE_EMULATED_DRIVER_ERROR": ("35", "cudaErrorInsufficientDriver"),
    "FASTMERGE_EMULATED_CODE_ERROR": (
        "209",
        "compiled for sm emulated, the device is sm 123: cudaErrorNoKernelImageForDevice",
    ),
}


@pytest.mark.parametrize("variable", REASONS)
def test_unsuitable_driver_or_device_is_the_reason(monkeypatch, variable: str) -> None:
    """An old driver or an architecture without code: the reference runs and the reason is told."""
    monkeypatch.setattr(extensions, "cuda", build())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 3))
    cuda.unavailable_reason.cache_clear()
    device = torch.device("cuda", 0)
    assert _native.for_device(device) == (cuda, "")
    cuda.unavailable_reason.cache_clear()
    code, message = REASONS[variable]
    monkeypatch.setenv(variable, code)
    kernels, reason = _native.for_device(device)
    assert kernels is None and reason.startswith(message)
    cuda.unavailable_reason.cache_clear()


def test_binding_refuses_what_would_crash() -> None:
    cuda = build()
    tensors = cuda.Tensors([0], [0, 0], [0], 2, 0, 0, False)
    place = cuda.Place(0, 1, 0)
    with pytest.raises(ValueError, match="multiprocessors: expected at least 1, found 0"):
        cuda.Place(0, 0, 0)
    with pytest.raises(ValueError, match="deltas: expected 4 pointers, found 2"):
        cuda.Tensors([0, 0], [0, 0], [0, 0], 2, 0, 0, False)
    with pytest.raises(ValueError, match="delta_dtype: expected dtype code 0, 1 or 2, found 3"):
        cuda.Tensors([0], [0, 0], [0], 2, 0, 3, False)
    with pytest.raises(ValueError, match="outs: expected 1 pointers, found 2"):
        cuda.weighted_sum(place, tensors, 0, [0, 0], 0)
    with pytest.raises(ValueError, match="merge: expected 0, 1 or 2, found 3"):
        cuda.ties_merge(place, tensors, 0, 0, 0, 0, 3, 1.0, 0, False)
