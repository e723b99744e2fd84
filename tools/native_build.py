"""How the native parts are compiled: the compilers, the flags and the ninja file."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"),
]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    "-Wno-maybe-uninitialized",  # GCC 12 warns inside its own intrinsics headers
]
DEFAULT_CUDA_ARCHS = ["8.0", "9.0", "10.0+PTX"]
CUDA_FALLBACK_HOMES = ("/usr/local/cuda",)


class BuildFailure(Exception):
    """A native part cannot be built; the message is the reason shown to the user."""


def find_cxx(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The C++ compiler's command: $CXX, or the first of c++, g++ and clang++ on PATH."""
    if environ.get("CXX"):
        command = shlex.split(environ["CXX"])
        if not shutil.which(command[0], path=environ.get("PATH", "")):
            raise BuildFailure(f"CXX={environ['CXX']}: no such command")
        return command
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name, path=environ.get("PATH", "")):
            return [found]
    raise BuildFailure("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def find_nvcc(
    environ: Mapping[str, str] = os.environ, homes: Sequence[str] = CUDA_FALLBACK_HOMES
) -> Path | None:
    """nvcc from $CUDA_HOME, $CUDA_PATH, PATH or one of `homes`; None when there is none."""
    named = [environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if environ.get(key)]
    for home in named:
        if (nvcc := Path(home) / "bin" / "nvcc").is_file():
            return nvcc
    if found := shutil.which("nvcc", path=environ.get("PATH", "")):
        return Path(found)
    for home in homes:
        if (nvcc := Path(home) / "bin" / "nvcc").is_file():
            return nvcc
    return None


def find_ninja() -> list[str]:
    """ninja's command: the one on PATH or the `ninja` package's."""
    if found := shutil.which("ninja"):
        return [found]
    try:
        import ninja  # noqa: F401
    except ImportError:
        raise BuildFailure("ninja not found") from None
    return [sys.executable, "-m", "ninja"]


def cpu_levels(machine: str = platform.machine()) -> dict[str, list[str]]:
    """Instruction-set levels of a machine and the flags that select each."""
    if machine.lower() in ("x86_64", "amd64"):
        return {"baseline": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}
    return {"baseline": []}


def cuda_archs(wanted: str | None, known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Architectures to compile as nvcc flags and as names such as "90" or "100+PTX".

    Args:
      wanted: TORCH_CUDA_ARCH_LIST, or None for the default list.
      known: what `nvcc --list-gpu-arch` prints, e.g. ["compute_80", "compute_90"].

    Raises BuildFailure when an entry is malformed or nvcc knows none of them.
    """
    entries = re.split(r"[;,\s]+", wanted.strip()) if wanted else DEFAULT_CUDA_ARCHS
    flags: list[str] = []
    names: list[str] = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildFailure(
                f"TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 10.0+PTX, found {entry!r}"
            )
        number = match[1] + match[2]
        if f"compute_{number}" not in known:
            continue
        arch = number + match[3]
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
        names.append(arch + (match[4] or ""))
    if not names:
        raise BuildFailure(f"nvcc knows none of the architectures {', '.join(entries)}")
    return flags, names


class NinjaFile:
    """The compile and link steps of one extension module."""

    def __init__(self, build_dir: Path) -> None:
        self.build_dir = build_dir
        self.steps: list[dict[str, str]] = []

    def compile(
        self, command: Sequence[str], source: Path, name: str, inputs: Sequence[Path] = ()
    ) -> Path:
        """Adds the step source -> object; `command` lacks only input, output and depfile."""
        output = self.build_dir / f"{name}.o"
        steps = [*command, "-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        self._add(output, [source, *inputs], steps, depfile=f"{output}.d")
        return output

    def link(self, command: Sequence[str], objects: Sequence[Path], output: Path) -> None:
        """Adds the step objects -> extension; `command` must name the objects and the output."""
        self._add(output, objects, command)

    def run(self) -> None:
        """Writes the file and runs ninja; raises BuildFailure with the first error lines."""
        self.build_dir.mkdir(parents=True, exist_ok=True)
        lines = ["rule step", "  command = $cmd", "  description = $out"]
        lines += ["rule compile", "  command = $cmd", "  description = $out"]
        lines += ["  depfile = $dep", "  deps = gcc"]
        for step in self.steps:
            rule = "compile" if step["dep"] else "step"
            lines += [f"build {step['out']}: {rule} {step['in']}", f"  cmd = {step['cmd']}"]
            lines += [f"  dep = {step['dep']}"] if step["dep"] else []
        path = self.build_dir / "build.ninja"
        path.write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [*find_ninja(), "-C", str(self.build_dir), "-j", jobs]
        result = subprocess.run(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        print(result.stdout, flush=True)
        if result.returncode != 0:
            errors = [line for line in result.stdout.splitlines() if "error" in line.lower()]
            raise BuildFailure("compilation failed: " + "; ".join(errors[:3] or ["see the log"]))

    def _add(
        self, output: Path, inputs: Sequence[Path], command: Sequence[str], depfile: str = ""
    ) -> None:
        def escape(text: str) -> str:
            return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        self.steps.append(
            {
                "out": escape(str(output)),
                "in": " ".join(escape(str(path)) for path in inputs),
                "cmd": shlex.join(command).replace("$", "$$"),
                "dep": depfile.replace("$", "$$"),
            }
        )


def _binding_flags() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise BuildFailure("pybind11 not found") from None
    headers = (sysconfig.get_path("include"), pybind11.get_include())
    return [flag for path in headers for flag in ("-isystem", path)]


def build_cpu(output: Path, build_dir: Path, extra_flags: Sequence[str] = ()) -> dict[str, object]:
    """Compiles csrc/cpu once per level and links `output`; returns what was built."""
    cxx = [*find_cxx(), *CXX_FLAGS, *extra_flags, f"-I{CSRC / 'include'}"]
    levels = cpu_levels()
    ninja = NinjaFile(build_dir)
    objects = [
        ninja.compile(
            [*cxx, f"-DFASTMERGE_LEVEL={level}", *flags], source, f"{level}/{source.stem}"
        )
        for level, flags in levels.items()
        for source in sorted((CSRC / "cpu").glob("*.cpp"))
    ]
    if len(levels) > 1:
        cxx.append("-DFASTMERGE_X86_LEVELS")
    objects.append(ninja.compile(cxx, CSRC / "bindings" / "dispatch.cpp", "dispatch"))
    binding = [*cxx, *_binding_flags()]
    objects.append(ninja.compile(binding, CSRC / "bindings" / "cpu.cpp", "binding"))
    link = [*cxx, "-shared", *map(str, objects), "-o", str(output)]
    output.parent.mkdir(parents=True, exist_ok=True)
    ninja.link(link, objects, output)
    ninja.run()
    return {"levels": list(levels)}


def nvcc_command(nvcc: Path, cxx: Sequence[str]) -> list[str]:
    """How csrc/cuda is compiled for any architecture."""
    # Without -fmad products and sums round separately, as on the CPU: the same bytes from both.
    command = [str(nvcc), "-ccbin", cxx[-1], "-std=c++17", "-O3", "-fmad=false"]
    command += ["-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [*command, f"-I{CSRC / 'include'}"]


def build_cuda(output: Path, build_dir: Path) -> dict[str, object]:
    """Compiles csrc/cuda with nvcc against the static runtime and links `output`."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildFailure("nvcc not found (looked in $CUDA_HOME, $CUDA_PATH, PATH)")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], text=True, capture_output=True)
    if listed.returncode != 0:
        raise BuildFailure(f"nvcc does not run: {listed.stderr.strip()}")
    flags, names = cuda_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), listed.stdout.split())
    toolkit = _toolkit(nvcc)
    cxx = find_cxx()
    common = [f"-I{CSRC / 'include'}", f'-DFASTMERGE_CUDA_ARCHS="{" ".join(names)}"']
    device = [*nvcc_command(nvcc, cxx), *flags, "--threads", "2", *common]
    ninja = NinjaFile(build_dir)
    objects = [
        ninja.compile(device, source, f"cuda/{source.stem}")
        for source in sorted((CSRC / "cuda").glob("*.cu"))
    ]
    host = [*cxx, *CXX_FLAGS, *common, *_binding_flags(), "-isystem", str(toolkit / "include")]
    objects.append(ninja.compile(host, CSRC / "bindings" / "cuda.cpp", "binding"))
    libraries = [f"-L{path}" for path in _library_dirs(toolkit)]
    link = [*cxx, "-shared", *map(str, objects), "-o", str(output), *libraries]
    link += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    output.parent.mkdir(parents=True, exist_ok=True)
    ninja.link(link, objects, output)
    ninja.run()
    return {"archs": names}


def _toolkit(nvcc: Path) -> Path:
    """The toolkit's folder as nvcc itself reports it, which holds for wrapper scripts too."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], text=True, capture_output=True
    )
    if match := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE):
        return Path(match[1].strip()).resolve()
    return nvcc.resolve().parent.parent


def _library_dirs(toolkit: Path) -> list[Path]:
    candidates = [toolkit / "lib64", toolkit / "lib", *sorted(toolkit.glob("targets/*/lib"))]
    return [path for path in candidates if path.is_dir()]


def write_build_info(path: Path, parts: Mapping[str, Mapping[str, object]]) -> None:
    """Records for every native part whether it was built, with what, or the reason why not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(parts, indent=2, sort_keys=True) + "\n")
