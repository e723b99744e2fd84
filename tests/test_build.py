"""How the native parts are found, compiled and loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fastmerge import _native
from fastmerge._native import extensions

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

needs_source = pytest.mark.skipif(not CSRC.is_dir(), reason="not a source checkout")
needs_cpu = pytest.mark.skipif(not _native.available(), reason=_native.unavailable_reason())


@pytest.fixture(scope="module")
def native_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "native_build", ROOT / "tools" / "native_build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def run_python(code: str, **environ: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    return result.stdout.strip()


@needs_source
def test_nvcc_is_none_when_absent(native_build, tmp_path: Path) -> None:
    assert native_build.find_nvcc({"PATH": ""}, homes=()) is None
    assert native_build.find_nvcc({}, homes=(str(tmp_path),)) is None
    assert native_build.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": ""}, homes=()) is None


@needs_source
def test_nvcc_is_found_in_order(native_build, tmp_path: Path) -> None:
    named, on_path, usual = (
        fake_program(tmp_path / name / "bin" / "nvcc") for name in ("named", "path", "usual")
    )
    homes = (str(tmp_path / "usual"),)
    assert native_build.find_nvcc({"PATH": ""}, homes) == usual
    environ = {"PATH": str(on_path.parent)}
    assert native_build.find_nvcc(environ, homes) == on_path
    environ["CUDA_PATH"] = str(tmp_path / "named")
    assert native_build.find_nvcc(environ, homes) == named


@needs_source
def test_missing_compiler_is_a_reason(native_build, tmp_path: Path) -> None:
    with pytest.raises(native_build.BuildFailure, match=r"no C\+\+ compiler found"):
        native_build.find_cxx({"PATH": str(tmp_path)})
    with pytest.raises(native_build.BuildFailure, match="CXX=absent-compiler"):
        native_build.find_cxx({"PATH": str(tmp_path), "CXX": "absent-compiler"})
    gxx = fake_program(tmp_path / "g++")
    assert native_build.find_cxx({"PATH": str(tmp_path)}) == [str(gxx)]


@needs_source
def test_cuda_architectures(native_build) -> None:
    known = ["compute_80", "compute_90", "compute_90a"]
    flags, names = native_build.cuda_archs(None, known)
    assert names == ["80", "90"] and len(flags) == 2
    flags, names = native_build.cuda_archs("9.0a+PTX; 12.0", known)
    assert names == ["90a+PTX"]
    assert flags[-1] == "-gencode=arch=compute_90a,code=compute_90a"
    with pytest.raises(native_build.BuildFailure, match="found 'Hopper'"):
        native_build.cuda_archs("Hopper", known)
    with pytest.raises(native_build.BuildFailure, match=r"none of the architectures 7\.0"):
        native_build.cuda_archs("7.0", known)


@needs_source
def test_levels_of_a_machine(native_build) -> None:
    assert list(native_build.cpu_levels("x86_64")) == ["baseline", "avx2", "avx512"]
    assert native_build.cpu_levels("aarch64") == {"baseline": []}


@needs_source
def test_sources_include_no_torch() -> None:
    sources = [path for path in CSRC.rglob("*") if path.is_file()]
    assert any(path.suffix == ".cu" for path in sources)
    for path in sources:
        found = re.findall(r"#\s*include\s*[<\"](?:torch|ATen|c10)/.*", path.read_text())
        assert not found, f"{path}: {found}"


@needs_source
def test_kernels_use_no_standard_library_and_python_stays_in_bindings() -> None:
    for path in (CSRC / "cpu").iterdir():
        text = path.read_text()
        headers = set(re.findall(r"#include <(.+)>", text))
        assert headers <= {"stdint.h", "string.h", "immintrin.h", "omp.h"}, path
        assert "std::" not in text, path
    for folder in ("cpu", "cuda", "include"):
        for path in (CSRC / folder).rglob("*.*"):
            assert "Python.h" not in path.read_text() and "pybind11" not in path.read_text()


@needs_cpu
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm not found")
@pytest.mark.parametrize("module", ["cpu", "cuda"])
def test_no_torch_symbols(module: str) -> None:
    extension = getattr(extensions, module)
    if extension is None:
        pytest.skip(_native.cuda_unavailable_reason())
    symbols = subprocess.run(
        ["nm", "-D", "-C", extension.__file__], text=True, capture_output=True, check=True
    ).stdout
    assert "PyInit" in symbols
    assert not re.search(r"\b(at|c10|torch)::", symbols)


@needs_cpu
@pytest.mark.xdist_group("build folder")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm not found")
def test_levels_share_no_weak_kernel_symbols(native_build) -> None:
    """A function shared between levels could carry one level's instructions into another."""
    build = sorted(ROOT.glob("build/native-*/_cpu"))
    if not build:
        pytest.skip("no build folder")
    seen: dict[str, str] = {}
    for level in ("baseline", "avx2", "avx512"):
        for path in build[0].glob(f"{level}/*.o"):
            listed = subprocess.run(["nm", path], text=True, capture_output=True, check=True)
            for line in listed.stdout.splitlines():
                *_, kind, symbol = line.split()
                if kind in "TWVuD":
                    assert seen.setdefault(symbol, level) == level, symbol


@needs_cpu
@pytest.mark.parametrize("level", extensions.cpu.supported_isas() if _native.available() else [])
def test_forced_level(level: str) -> None:
    code = "from fastmerge._native import extensions; print(extensions.cpu.isa())"
    assert run_python(code, FASTMERGE_ISA=level) == level


@needs_cpu
def test_unknown_forced_level_is_the_reason() -> None:
    code = "from fastmerge import _native; print(_native.available(), _native.unavailable_reason())"
    out = run_python(code, FASTMERGE_ISA="avx1024")
    assert out.startswith("False") and "FASTMERGE_ISA" in out and "'avx1024'" in out


def test_best_level_is_the_default() -> None:
    if not _native.available() or os.environ.get("FASTMERGE_ISA"):
        pytest.skip("no level to choose")
    code = (
        "from fastmerge._native.extensions import cpu; print(cpu.isa() == cpu.supported_isas()[-1])"
    )
    assert run_python(code) == "True"


def test_cuda_module_without_a_device() -> None:
    if extensions.cuda is None:
        assert _native.cuda_unavailable_reason()
        return
    info = extensions.cuda.device_info()
    assert info["archs"] and info["runtime_version"] >= 12000
    assert info["available"] == (info["device_count"] > 0)
    assert bool(info["reason"]) != info["available"]
    assert _native.cuda_unavailable_reason() == info["reason"]
    if not info["available"]:
        with pytest.raises(RuntimeError, match="cuda"):
            extensions.cuda.probe(0, 0, 0)


def test_cuda_probe_runs() -> None:
    torch = pytest.importorskip("torch")
    if _native.cuda_unavailable_reason() or not torch.cuda.is_available():
        pytest.skip(_native.cuda_unavailable_reason() or "torch sees no CUDA device")
    assert extensions.cuda.device_reason(0) == ""
    arch = torch.zeros(1, dtype=torch.int32, device="cuda")
    extensions.cuda.probe(0, arch.data_ptr(), torch.cuda.current_stream().cuda_stream)
    major, minor = torch.cuda.get_device_capability(0)
    assert 0 < arch.item() <= major * 100 + minor * 10


def test_build_info_names_every_part() -> None:
    info = extensions.build_info()
    assert set(info) == {"fastmerge._cpu", "fastmerge._cuda"}
    for part in info.values():
        assert part["built"] or part["reason"]


@needs_source
def test_build_info_round_trip(native_build, tmp_path: Path) -> None:
    parts = {"fastmerge._cpu": {"built": False, "reason": "no C++ compiler found"}}
    native_build.write_build_info(tmp_path / "fastmerge" / "info.json", parts)
    assert json.loads((tmp_path / "fastmerge" / "info.json").read_text()) == parts


@needs_source
@pytest.mark.xdist_group("build folder")
def test_isolated_wheel(tmp_path: Path) -> None:
    """`pip wheel .` in an isolated environment without torch gives a complete wheel."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), "."]
    environment = os.environ | {"FASTMERGE_CUDA": "0"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if "No matching distribution found for setuptools" in result.stderr:
        pytest.skip("the build requirements cannot be downloaded")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("fastmerge-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = ("__init__.py", "ops/ties.py", "kernels/merged_linear.py", "methods/ties.py")
    assert all(f"fastmerge/{name}" in names for name in expected)
    assert "fastmerge/demo/requirements-data.txt" in names
    assert not any(name.startswith(("kernels/", "tests/", "benches/")) for name in names)
    if native_compiler():
        assert any(name.startswith("fastmerge/_cpu.") for name in names)


def native_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "c++")) is not None
