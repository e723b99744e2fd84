"""Whole merge jobs, start-up included, beside mergekit where there is an interpreter that has it.

FASTMERGE_MERGEKIT_PYTHON names that interpreter; without it only our own figures are recorded.
FASTMERGE_BENCH_MODEL is 0.5B (the default), 1.5B or tiny, FASTMERGE_BENCH_FOLDER where models are
kept from one run to the next, FASTMERGE_BENCH_METHODS a choice of methods such as linear,ties.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastmerge.checkpoint import Checkpoint

from .job_recipes import make_models, recipe
from .side_by_side import Results

EXPERTS = 4
METHODS = (
    "linear",
    "task_arithmetic",
    "slerp",
    "model_stock",
    "ties",
    "dare_ties",
    "sce",
    "breadcrumbs",
    "della",
)
RANDOM = ("dare_ties", "della")
CHOSEN = os.environ.get("FASTMERGE_BENCH_METHODS", ",".join(METHODS)).split(",")
SAMPLE_SECONDS = 0.02
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def size(small: bool) -> str:
    return "tiny" if small else os.environ.get("FASTMERGE_BENCH_MODEL", "0.5B")


@pytest.fixture(scope="module")
def models(size: str, tmp_path_factory: pytest.TempPathFactory):
    kept = os.environ.get("FASTMERGE_BENCH_FOLDER")
    folder = (Path(kept) if kept else tmp_path_factory.mktemp("jobs")) / size
    yield make_models(folder, size, EXPERTS)
    if not kept:
        shutil.rmtree(folder)


def _commands() -> dict[str, list[str]]:
    """What comes before recipe and output."""
    commands = {"fastmerge": [sys.executable, "-m", "fastmerge", "merge", "--quiet"]}
    other = os.environ.get("FASTMERGE_MERGEKIT_PYTHON")
    if other:
        script = Path(other).with_name("mergekit-yaml")
        quiet = ["--no-copy-tokenizer", "--quiet", "--random-seed", "0"]
        commands["mergekit"] = [str(script), *quiet]
    return commands


def _environment() -> dict[str, str]:
    """Ours, without what would make either side compile its modules anew in every run."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | offline | {"PYTHONPATH": os.pathsep.join(paths)}


def _run(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """A process's CPU and wall seconds and the peak of its anonymous memory in bytes."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    status, peak, done = Path(f"/proc/{process.pid}/status"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], 1024 * int(line.split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    message = process.stderr.read().decode()  # until the process closes it, at its end
    done.set()
    watcher.join()
    _, code, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(code)
    assert process.returncode == 0, message
    return {"cpu": used.ru_utime + used.ru_stime, "wall": wall, "peak": peak[0]}


def _check_agreement(method: str, a: Path, b: Path, base: Path, expert: Path) -> None:
    """Two merged checkpoints are one method's: alike on some tensors up to rounding to bf16, once
    and several times, against how far an expert moved (a merged model may be as good as the base);
    with independent draws only how far they moved can agree.

    Raises:
        AssertionError: they are not.
    """
    apart = moved = ours_moved = theirs_moved = 0.0
    folders = [Checkpoint.open(folder) for folder in (a, b, base, expert)]
    assert folders[0].tensors.keys() == folders[1].tensors.keys()
    for key in list(folders[0].tensors)[1:12]:
        ours, theirs, start, tuned = (folder.read(key).double() for folder in folders)
        apart += float((ours - theirs).square().sum())
        moved += float((tuned - start).square().sum())
        ours_moved += float((ours - start).square().sum())
        theirs_moved += float((theirs - start).square().sum())
    if method in RANDOM:
        ratio = (ours_moved / theirs_moved) ** 0.5
        assert 0.9 < ratio < 1.1, f"the results moved {ratio} times as far"
    else:
        assert apart < 0.25 * moved, f"the results differ by {(apart / moved) ** 0.5}"


@pytest.mark.parametrize("method", METHODS)
def test_job(method, size, models, device, rounds, small, results: Results, tmp_path):
    """CPU seconds, wall seconds and peak anonymous memory of jobs run in turn."""
    if method not in CHOSEN:
        pytest.skip("not chosen by FASTMERGE_BENCH_METHODS")
    if device.type != "cpu" or not Path("/proc/self/status").exists():
        pytest.skip("measures processes on the CPU, by Linux's means")
    commands, environment = _commands(), _environment()
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(method, models))
    for command in commands.values():  # compiles their modules, and loads them into the cache
        subprocess.run([*command, "--help"], env=environment, check=True, capture_output=True)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in commands}
    for number in range(1 if small else min(3, rounds)):
        for way, command in commands.items():
            shutil.rmtree(tmp_path / way, ignore_errors=True)
            runs[way].append(_run([*command, str(file), str(tmp_path / way)], environment))
        if number == 0 and len(runs) > 1:
            _check_agreement(method, *(tmp_path / way for way in runs), *models[:2])
    for way in commands:
        shutil.rmtree(tmp_path / way)
    case = f"{method} {size} K={2 if method == 'slerp' else EXPERTS} bf16"
    for kind, name in (("cpu", "CPU"), ("wall", "wall")):
        seconds = {w: statistics.median(r[kind] for r in found) for w, found in runs.items()}
        results.add("Jobs", f"{case} {name}", seconds, "fastmerge")
    entries = sum(t.nbytes for t in Checkpoint.open(models[0]).tensors.values())
    for way, found in runs.items():
        peak = max(run["peak"] for run in found)
        results.add_value("Jobs", f"{case} memory", way, peak / entries, "one model", int(peak))
