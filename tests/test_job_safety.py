"""What a job survives: being killed, a full or failing disk, other processes; and who verifies."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from fastmerge.checkpoint import CheckpointError
from fastmerge.checkpoint.writer import partial_folder
from fastmerge.jobs import engine, store
from fastmerge.jobs.journal import Journal, is_ours, read_journals, replaced_names
from fastmerge.methods import Average, TaskArithmetic, Ties

from .jobs import Slow, hash_folder, make_plan, quick_commits, small_blocks, start_job, write_models


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    small_blocks(monkeypatch.setattr)


def run(plan, out, **options):
    engine.run(plan, out, **{"threads": 2, **options})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_job_that_is_killed_ten_times_gives_the_same_bytes(tmp_path):
    folders = write_models(tmp_path)
    run(make_plan(folders, Slow(0.3), shard_bytes=30_000), tmp_path / "expected")
    partial, draw, finished = partial_folder(tmp_path / "out"), random.Random(0), 0
    for attempt in range(10):
        process = start_job(tmp_path, "slow")
        if attempt % 2:  # half of the jobs get somewhere, whatever the machine's speed
            while process.is_alive() and len(read_journals(partial)[1]) <= finished:
                time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        now = len(read_journals(partial)[1]) if partial.exists() else 0
        assert now >= finished + attempt % 2
        finished = now
    assert not (tmp_path / "out").exists()
    process = start_job(tmp_path, "slow")
    process.join()
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "expected")
    assert names(tmp_path) == sorted([*folders, "errors", "expected", "out"])


class Killed(BaseException):
    """Stands for the end of the process."""


def killed(monkeypatch, plan, out, after, **options):
    """Run a job that dies when it writes its block number `after`; one thread, so it is certain."""
    write, count = store.Store.write, iter(range(10_000))

    def write_or_die(self, *arguments):
        if next(count) == after:
            raise Killed
        write(self, *arguments)

    with monkeypatch.context() as patch:
        quick_commits(patch.setattr)
        patch.setattr(store.Store, "write", write_or_die)
        with pytest.raises(Killed):
            run(plan, out, threads=1, **options)


@pytest.mark.parametrize("method", [Ties(), Ties(scope="tensor")], ids=["model", "tensor"])
def test_resuming_does_not_repeat_finished_blocks(tmp_path, monkeypatch, method):
    folders = write_models(tmp_path)
    plan = make_plan(folders, method)
    run(plan, tmp_path / "expected")
    killed(monkeypatch, plan, tmp_path / "out", 60)
    written = []
    write = store.Store.write
    monkeypatch.setattr(
        store.Store, "write", lambda self, *a: (written.append(a[1:3]), write(self, *a))
    )
    run(plan, tmp_path / "all")
    everything, written[:] = set(written), []
    run(plan, tmp_path / "out", resume=True)
    assert 0 < len(set(written)) < len(everything)
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "expected")


def test_without_resume_a_job_begins_anew(tmp_path, monkeypatch):
    folders = write_models(tmp_path)
    killed(monkeypatch, make_plan(folders, Ties()), tmp_path / "out", 60)
    run(make_plan(folders, Average()), tmp_path / "out")
    run(make_plan(folders, Average()), tmp_path / "expected")
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "expected")


def test_only_the_same_job_is_resumed(tmp_path, monkeypatch):
    folders = write_models(tmp_path)
    killed(monkeypatch, make_plan(folders, TaskArithmetic(0.3)), tmp_path / "out", 60)
    for plan in (
        make_plan(folders, TaskArithmetic(0.4)),
        make_plan(folders, TaskArithmetic(0.3), torch.bfloat16),
        make_plan(folders, TaskArithmetic(0.3), seed=1),
    ):
        with pytest.raises(CheckpointError, match="another recipe, other inputs"):
            run(plan, tmp_path / "out", resume=True)
    os.utime(folders["base"] / "model.safetensors")
    with pytest.raises(CheckpointError, match="another recipe, other inputs"):
        run(make_plan(folders, TaskArithmetic(0.3)), tmp_path / "out", resume=True)


def test_a_line_that_was_cut_off_is_no_obstacle(tmp_path, monkeypatch):
    folders = write_models(tmp_path)
    plan = make_plan(folders, Ties())
    run(plan, tmp_path / "expected")
    killed(monkeypatch, plan, tmp_path / "out", 60)
    journal = partial_folder(tmp_path / "out") / ".journal.0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    killed(monkeypatch, plan, tmp_path / "out", 20, resume=True)
    run(plan, tmp_path / "out", resume=True)
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "expected")


@pytest.mark.parametrize("step", ["rename", "second rename", "rmtree", "remove_journals"])
def test_a_kill_while_the_output_is_published(tmp_path, monkeypatch, step):
    """Wherever it happens, one of the outputs is there or comes back, and resuming finishes."""
    folders = write_models(tmp_path)
    run(make_plan(folders, Average()), tmp_path / "out")
    run(make_plan(folders, Ties()), tmp_path / "expected")
    old, new = hash_folder(tmp_path / "out"), hash_folder(tmp_path / "expected")
    with monkeypatch.context() as patch:

        def die(*arguments, **keywords):
            raise Killed

        if step == "remove_journals":
            patch.setattr(engine, "remove_journals", die)
        elif step == "rmtree":
            patch.setattr("fastmerge.checkpoint.writer.shutil.rmtree", die)
        else:
            rename, calls = os.rename, []

            def rename_or_die(*arguments, **keywords):
                calls.append(arguments)
                if len(calls) == (2 if step == "second rename" else 1):
                    raise Killed
                return rename(*arguments, **keywords)

            patch.setattr("pathlib.os.rename", rename_or_die)
        with pytest.raises(Killed):
            run(make_plan(folders, Ties()), tmp_path / "out", overwrite=True)
    run(make_plan(folders, Ties()), tmp_path / "out", overwrite=True, resume=True)
    assert hash_folder(tmp_path / "out") == new != old
    assert names(tmp_path) == sorted([*folders, "expected", "out"])


def fail(monkeypatch, function, code, after):
    """Let a function of the system fail after some calls."""
    real, count = getattr(os, function), iter(range(10_000))

    def failing(*arguments):
        if next(count) >= after:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, function, failing)


FAILURES = [
    ("posix_fallocate", errno.ENOSPC, 0),
    ("posix_fallocate", errno.ENOSPC, 2),
    ("pwrite", errno.EIO, 0),
    ("pwrite", errno.ENOSPC, 20),
    ("fdatasync", errno.EIO, 1),
    ("fsync", errno.EIO, 0),
    ("fsync", errno.ENOSPC, 3),
    ("mkdir", errno.EACCES, 0),
]


@pytest.mark.parametrize("function, code, after", FAILURES)
def test_a_disk_that_fails_costs_nothing(tmp_path, monkeypatch, function, code, after):
    folders = write_models(tmp_path)
    run(make_plan(folders, Average()), tmp_path / "out")
    inputs = {name: hash_folder(folder) for name, folder in folders.items()}
    before = hash_folder(tmp_path / "out")
    plan = make_plan(folders, Ties(), shard_bytes=30_000)
    with monkeypatch.context() as patch:
        fail(patch, function, code, after)
        with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
            run(plan, tmp_path / "out", overwrite=True)
    assert "the output needs" in str(caught.value) and "free now" in str(caught.value)
    assert hash_folder(tmp_path / "out") == before
    assert inputs == {name: hash_folder(folder) for name, folder in folders.items()}
    kept = partial_folder(tmp_path / "out").exists()
    assert kept == ("resume to go on" in str(caught.value))
    run(plan, tmp_path / "out", overwrite=True, resume=True)
    run(plan, tmp_path / "expected")
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "expected")


def test_an_output_that_cannot_take_its_place_gives_it_back(tmp_path, monkeypatch):
    """The second of three renames fails."""
    folders = write_models(tmp_path)
    run(make_plan(folders, Average()), tmp_path / "out")
    before, rename, calls = hash_folder(tmp_path / "out"), os.rename, iter(range(9))

    def failing(*arguments, **keywords):
        if next(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.os.rename", failing)
        with pytest.raises(CheckpointError, match="Input/output error; the output needs"):
            run(make_plan(folders, Ties()), tmp_path / "out", overwrite=True)
    assert hash_folder(tmp_path / "out") == before
    assert names(tmp_path) == sorted([*folders, ".out.partial", "out"])
    run(make_plan(folders, Ties()), tmp_path / "out", overwrite=True, resume=True)
    run(make_plan(folders, Ties()), tmp_path / "expected")
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "expected")


def test_a_journal_that_has_no_room_for_a_line_says_so(tmp_path):
    """The system then writes a part of it and reports no error."""
    journal = Journal(tmp_path, 0)
    journal.claim()
    size = (tmp_path / ".journal.0.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            journal.replaces(".out.previous-0123456789abcdef")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.close()
    assert (tmp_path / ".journal.0.jsonl").stat().st_size == size + 10
    Journal(tmp_path, 0).close()
    assert is_ours(tmp_path) and not replaced_names(tmp_path)


def test_a_disk_without_room_is_noticed_first(tmp_path, monkeypatch):
    folders = write_models(tmp_path)
    usage = type("usage", (), {"free": 1234})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"the output needs \d\d,\d+ bytes, 1,234 are free"):
        run(make_plan(folders, Average()), tmp_path / "out")
    assert names(tmp_path) == sorted(folders)


def test_a_disk_that_is_full(tmp_path):
    """A real one, a few kilobytes of memory mounted for a process of its own."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    script = [sys.executable, "-m", "tests.full_disk", str(tmp_path)]
    mount = f"mkdir {tmp_path}/disk && mount -t tmpfs -o size=400k none {tmp_path}/disk"
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("this system lets nobody mount a disk")
    folders = write_models(tmp_path)
    inputs = {name: hash_folder(folder) for name, folder in folders.items()}
    command = [*unshare, "sh", "-c", f"{mount} && exec {shlex.join(script)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    size = found["size"]
    assert re.search(rf"the output needs {size:,} bytes, [\d,]+ are free", found["noticed"])
    assert f"No space left on device; the output needs {size:,} bytes" in found["weights"]
    assert "model.safetensors" in found["weights"]
    assert f"No space left on device; the output needs {size:,} bytes" in found["texts"]
    assert "tokenizer.json" not in found["noticed"] and "resume to go on" in found["texts"]
    assert found["left"] == [
        ["earlier", "out"],
        ["earlier", "out"],
        [".out.partial", "earlier", "out"],
    ]
    assert found["kept"] == [True] * 3 and found["resumed"]
    assert inputs == {name: hash_folder(folder) for name, folder in folders.items()}


def test_a_limit_on_file_sizes(tmp_path):
    """A real failure of the system instead of an injected one."""
    folders = write_models(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large; the output needs"):
            run(make_plan(folders, Average()), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == sorted(folders)


def test_verification_finds_a_disk_that_lies(tmp_path, monkeypatch):
    folders = write_models(tmp_path)
    plan = make_plan(folders, Average())
    read = store.Writer.read

    def lie(self, name, *arguments):
        data = bytearray(read(self, name, *arguments))
        if name == "long":
            data[-1] ^= 1
        return bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "read", lie)
        with pytest.raises(CheckpointError, match=r"tensor 'long', rows .* read back with sha256"):
            run(plan, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_progress_tells_bytes_tensors_speed_and_the_time_left(tmp_path, monkeypatch, capsys):
    folders = write_models(tmp_path)
    plan = make_plan(folders, Ties())
    killed(monkeypatch, plan, tmp_path / "out", 60)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run(plan, tmp_path / "out", resume=True)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().err)
    last = [line for line in re.split(r"[\r\n]", shown) if "merging" in line][-1]
    assert re.search(r"merging .* (\d[\d.]*)/\1 .B .* [kM]B/s 7/7 tensors 0:00:0\d", last), last


def test_blocks_without_a_digest_are_made_again_for_verification(tmp_path, monkeypatch):
    folders = write_models(tmp_path)
    plan = make_plan(folders, Average())
    killed(monkeypatch, plan, tmp_path / "out", 60)
    run(plan, tmp_path / "out", resume=True, verify=True)
    run(plan, tmp_path / "expected")
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "expected")


def run_processes(folder, count, method, fault=""):
    """A job shared by processes, as torchrun starts them: their exit codes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = [start_job(folder, method, (rank, count, port), fault) for rank in range(count)]
    for process in processes:
        process.join(120)
        process.kill()  # one that still waits fails the test by its exit code
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("method", ["ties", "ties each"])
def test_processes_share_a_job(tmp_path, count, method):
    folders = write_models(tmp_path)
    scope = "model" if method == "ties" else "tensor"
    run(make_plan(folders, Ties(scope=scope), shard_bytes=30_000), tmp_path / "expected")
    codes = run_processes(tmp_path, count, method)
    assert codes == [0] * count, (tmp_path / "errors").read_text()
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "expected")
    assert names(tmp_path) == sorted([*folders, "errors", "expected", "out"])


def test_an_error_of_one_process_is_an_error_of_all(tmp_path):
    folders = write_models(tmp_path)
    path = folders["expert1"] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = torch.tensor([float("nan")]).numpy().tobytes()
    path.write_bytes(data)
    assert any(t.isnan().any() for t in load_file(path).values())
    assert run_processes(tmp_path, 2, "ties") == [1, 1]
    errors = (tmp_path / "errors").read_text()
    assert "has NaN or Inf entries" in errors and "failed: ValueError" in errors
    assert names(tmp_path) == sorted([*folders, "errors"])


def test_a_process_that_cannot_open_the_output_ends_all(tmp_path):
    """The others do not wait for it, and the job can be resumed."""
    folders = write_models(tmp_path)
    assert run_processes(tmp_path, 2, "ties", fault="store") == [1, 1]
    errors = (tmp_path / "errors").read_text()
    assert "rank 1 failed: CheckpointError" in errors and "Too many open files" in errors
    assert "resume to go on" in errors
    assert run_processes(tmp_path, 2, "ties") == [0, 0]
    run(make_plan(folders, Ties(), shard_bytes=30_000), tmp_path / "expected")
    assert hash_folder(tmp_path / "out") == hash_folder(tmp_path / "expected")


def test_a_process_that_dies_ends_all(tmp_path):
    write_models(tmp_path)
    assert run_processes(tmp_path, 2, "ties", fault="death") == [1, -9]
    assert "another process of this job is gone" in (tmp_path / "errors").read_text()
    assert not (tmp_path / "out").exists()
    assert run_processes(tmp_path, 2, "ties") == [0, 0]


def test_journals_tell_only_of_what_is_on_the_disk(tmp_path, monkeypatch):
    """Data before journal: the order that makes a power failure harmless."""
    folders = write_models(tmp_path)
    order = []
    sync, finished = store.Writer.sync, Journal.finished
    monkeypatch.setattr(store.Writer, "sync", lambda self: (order.append("data"), sync(self)))
    monkeypatch.setattr(
        Journal, "finished", lambda self, b: (order.append("journal"), finished(self, b))
    )
    run(make_plan(folders, Average()), tmp_path / "out")
    assert len(order) > 2 and order[::2] == ["data"] * len(order[::2])
    assert order[1::2] == ["journal"] * len(order[1::2])
