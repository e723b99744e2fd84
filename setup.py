"""Builds the native parts that this machine can build and records why the others are missing."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# A build front end does not put the project's own folder on the path.
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from tools import native_build  # noqa: E402  (found only through the line above)

TAG = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

PARTS: dict[str, tuple[str, Callable[[Path, Path], dict[str, object]]]] = {
    "fastmerge._cpu": ("FASTMERGE_NATIVE", native_build.build_cpu),
    "fastmerge._cuda": ("FASTMERGE_CUDA", native_build.build_cuda),
}


def switch(variable: str) -> str:
    """The value of a build switch: "auto", "0" (leave out) or "1" (failing is an error)."""
    value = os.environ.get(variable) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: expected auto, 0 or 1, found {value!r}")
    return value


class BuildNative(build_ext):
    """Compiles each extension with ninja; one that cannot be built is left out with its reason."""

    def run(self) -> None:
        self.parts: dict[str, dict[str, object]] = {}
        super().run()
        native_build.write_build_info(Path(self._info_path()), self.parts)
        if self.inplace or self.editable_mode:
            native_build.write_build_info(HERE / "fastmerge" / "_build_info.json", self.parts)
        for name, part in self.parts.items():
            state = "built" if part["built"] else f"not built: {part['reason']}"
            print(f"{name}: {state}", flush=True)

    def build_extension(self, ext: Extension) -> None:
        variable, build = PARTS[ext.name]
        wanted = switch(variable)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp, which is a fresh folder in an editable install: ninja keeps its objects.
        build_dir = HERE / "build" / f"native-{TAG}" / ext.name.removeprefix("fastmerge.")
        # A module of an earlier build must not survive a build that leaves it out.
        source_copy = HERE / "fastmerge" / output.name
        try:
            if wanted == "0":
                raise native_build.BuildFailure(f"left out by {variable}=0")
            details = build(output, build_dir)
            self.parts[ext.name] = {"built": True, **details}
        except (native_build.BuildFailure, OSError) as error:
            if wanted == "1":
                raise
            output.unlink(missing_ok=True)
            if self.inplace or self.editable_mode:
                source_copy.unlink(missing_ok=True)
            self.parts[ext.name] = {"built": False, "reason": str(error)}

    def get_outputs(self) -> list[str]:
        built = [name for name, part in getattr(self, "parts", {}).items() if part["built"]]
        return [*(self.get_ext_fullpath(name) for name in built), self._info_path()]

    def _info_path(self) -> str:
        return os.path.join(self.build_lib, "fastmerge", "_build_info.json")


setup(
    packages=[*find_packages(include=["fastmerge", "fastmerge.*"]), "fastmerge.kernels"],
    package_dir={"fastmerge": "fastmerge", "fastmerge.kernels": "kernels"},
    ext_modules=[Extension(name, sources=[], optional=True) for name in PARTS],
    cmdclass={"build_ext": BuildNative},
)
