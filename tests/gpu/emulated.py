"""Builds the CUDA extension as host C++, with the kernels' threads run as fibers on the CPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "cuda_on_cpu"
BUILD = ROOT / "build" / "cuda-on-cpu"


def load_file(name: str, path: Path) -> ModuleType:
    """Import a file as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def native_build() -> ModuleType:
    """tools/native_build.py; skips the test outside a source checkout."""
    path = ROOT / "tools" / "native_build.py"
    if not path.is_file():
        pytest.skip("not a source checkout")
    return load_file("native_build", path)


@cache
def build() -> ModuleType:
    """The emulated extension; skips where g++ or the CUDA headers are missing."""
    build = native_build()
    nvcc = build.find_nvcc()
    if nvcc is None or sys.platform != "linux":
        pytest.skip("the CUDA headers come with nvcc, which was not found")
    import fcntl  # which other systems lack

    try:
        cxx = [*build.find_cxx(), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]
        python = build._binding_flags()
    except build.BuildFailure as failure:
        pytest.skip(str(failure))
    if "clang" in subprocess.run([cxx[0], "--version"], capture_output=True, text=True).stdout:
        pytest.skip("clang would compile .cu files for a device")
    headers = [f"-I{SHIM}", f"-I{build.CSRC / 'include'}", "-isystem"]
    headers += [str(build._toolkit(nvcc) / "include"), "-include", str(SHIM / "emulation.h")]
    cxx += ["-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *headers]
    ninja = build.NinjaFile(BUILD)
    shim = [*SHIM.glob("*.h"), *SHIM.glob("*/*.h")]
    sources = [*sorted((build.CSRC / "cuda").glob("*.cu")), SHIM / "emulation.cpp"]
    objects = [ninja.compile([*cxx, "-x", "c++"], path, path.stem, shim) for path in sources]
    binding = [*cxx, *python, '-DFASTMERGE_CUDA_ARCHS="emulated"']
    objects.append(ninja.compile(binding, build.CSRC / "bindings" / "cuda.cpp", "binding", shim))
    output = BUILD / "_cuda.so"
    link = [cxx[0], "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(output)]
    ninja.link(link, objects, output)
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # other test processes build it too
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja.run()
    return load_file("emulated._cuda", output)
