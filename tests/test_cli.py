"""The command line: listings, versions, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

from fastmerge import __version__
from fastmerge.methods import METHODS
from fastmerge.modules.dynamic import METHODS as DYNAMIC
from fastmerge.ops._library import REGISTERED


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastmerge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_version_and_help_do_not_import_torch():
    code = "import sys, fastmerge.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert _run("--version").stdout == f"fastmerge {__version__}\n"
    shown = _run("--help").stdout
    assert all(command in shown for command in ("info", "methods", "demo"))


def test_info():
    text, facts = _run("info").stdout, json.loads(_run("info", "--json").stdout)
    assert facts["fastmerge"] == __version__ and set(facts["ops"]) == set(REGISTERED)
    assert all(name in text for name in REGISTERED)


def test_methods_lists_every_method_with_its_parameters():
    text = _run("methods").stdout
    for name, method in METHODS.items():
        assert f"{name}: {method.summary}" in text
        assert all(f"{p.name}={p.default!r}" in text for p in method.parameters)
    for name in ("adamerging_layer", *DYNAMIC):
        assert f"\n{name}: " in text
    assert "  depth=2: " in text and "  granularity='layer': " in text


def test_errors_are_one_line(tmp_path):
    result = _run("demo", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert result.stderr.startswith("fastmerge: ") and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_a_job_does_not_need_of_torch_is_imported_when_it_is_used():
    code = """
import sys
from fastmerge.job_process import UNUSED, import_torch
import_torch()
import torch, fastmerge.jobs.engine, fastmerge.jobs.planning
assert not {"torch._decomp", "sympy", "transformers"} & set(sys.modules)
assert not hasattr(torch._meta_registrations, "__file__")  # asked of all modules, needs none
torch.zeros(3, device="meta").add(1)
assert callable(torch._meta_registrations.meta_index_Tensor)
assert sys.modules[UNUSED].__file__ and "torch._decomp" in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
