"""What a machine without a GPU can prove about the CUDA kernels' code, and how absence is told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastmerge import _native
from fastmerge._native import cuda, extensions

from .gpu.emulated import ROOT, build, native_build

SOURCES = sorted((ROOT / "csrc" / "cuda").iterdir())
STREAMING = [p.name for p in SOURCES if p.suffix == ".cu" and p.name != "device_info.cu"]


@pytest.fixture(scope="module")
def tools() -> ModuleType:
    return native_build()


@pytest.fixture(scope="module")
def nvcc(tools: ModuleType) -> list[str]:
    """The command of the build, without architectures."""
    found = tools.find_nvcc()
    if found is None:
        pytest.skip("nvcc not found")
    return tools.nvcc_command(found, tools.find_cxx())


def cuobjdump() -> str:
    """The one on PATH or Triton's; skips the test where there is none."""
    if on_path := shutil.which("cuobjdump"):
        return on_path
    triton = pytest.importorskip("triton", reason="cuobjdump not found")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def test_no_kernel_spills() -> None:
    """What does not fit into registers goes to memory and costs a streaming kernel bandwidth."""
    if extensions.cuda is None:
        pytest.skip(_native.cuda_unavailable_reason())
    command = [cuobjdump(), "-res-usage", extensions.cuda.__file__]
    report = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    built = extensions.cuda.device_info()["archs"].split()
    assert set(re.findall(r"^arch = sm_(\w+)$", report, re.M)) == {a.split("+")[0] for a in built}
    kernels = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", report)
    code = "".join(path.read_text() for path in SOURCES)
    written = re.findall(r"__global__.*?(\w+_kernel)\(", code, re.DOTALL)
    assert len(written) == code.count("__global__")
    assert [name for name in written if not any(name in kernel for kernel, *_ in kernels)] == []
    assert [kernel for kernel, *bytes_ in kernels if any(map(int, bytes_))] == []


@pytest.mark.parametrize("source", STREAMING)
def test_rounding_and_access_width(nvcc, source: str, tmp_path: Path) -> None:
    """No fused multiply-add, so that bytes equal the CPU's; 16 bytes an access (elect: 8, for its
    registers hold every delta's entries); 64-bit indices."""
    output = tmp_path / "kernels.ptx"
    command = [*nvcc, "-ptx", "-arch=compute_80", "-o", str(output)]
    subprocess.run([*command, str(ROOT / "csrc" / "cuda" / source)], check=True)
    ptx = output.read_text()
    assert ("ld.global.nc.v2" if source == "elect.cu" else "ld.global.nc.v4") in ptx
    assert not re.search(r"\b(fma|mad)\.rn\.f(32|64)", ptx)
    assert not re.search(r"\.(ftz|approx)\b", ptx)
    if source in ("weighted_sum.cu", "combine_and_dot.cu", "ties.cu", "masked_combine.cu"):
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
