"""Builds the CPU kernels with GCC's address and undefined-behaviour checks and tests them so.

The build lies apart from the installed one; `tests/sanitized.py` puts it in its place. A first
wrong access or undefined operation ends the run with a report.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tools import native_build  # noqa: E402  (found only through the line above)

FLAGS = [
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
    # The address check finds what these would, at a third of the compilation's time; so does
    # calling it instead of writing it out at every access.
    *("-fno-sanitize=vptr,null,object-size,pointer-overflow", "-fno-sanitize-recover=all"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),
]
BUILD = native_build.ROOT / "build" / "sanitize"
TESTED = (
    "native native_levels weighted_sum coefficient_grad combine_and_dot merged_linear ties elect "
    "magnitude_threshold masks masked masked_merge row_gram softmax_entropy combine_rows "
    "grouped_linear row_linear"
)
TESTS = [f"tests/test_{name}.py" for name in TESTED.split()]


def runtimes() -> str:
    """What must be loaded before Python: the checks, to see every allocation, and the C++ library,
    because the checks look for its exceptions when they start."""
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*native_build.find_cxx(), f"-print-file-name={name}"]
        found.append(subprocess.run(command, text=True, capture_output=True).stdout.strip())
        if not os.path.isabs(found[-1]):
            raise SystemExit(f"needs GCC with {name}; {' '.join(command)} found {found[-1]!r}")
    return " ".join(found)


def main() -> int:
    output = BUILD / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    preload = runtimes()
    native_build.build_cpu(output, BUILD, FLAGS)
    # Python keeps memory until it ends, so a search for leaks would only list that.
    environment = os.environ | {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FASTMERGE_SANITIZED": str(output),
    }
    # Larger sizes take the same paths; fp64 and the reference never reach a kernel.
    chosen = ["-k", "not 100003 and not 37x1083 and not float64 and not reference-"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.sanitized", *chosen, *TESTS]
    return subprocess.run(command + sys.argv[1:], cwd=native_build.ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
