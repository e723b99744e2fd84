"""Merge jobs for tests: small models on disk, plans over them, and a method that takes its time."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastmerge.checkpoint import Checkpoint
from fastmerge.jobs import blocks, engine, store, work
from fastmerge.jobs.plan import Output, Plan, Source
from fastmerge.methods import Block, Method, TaskArithmetic, Ties

from .checkpoints import dense, write_folder

SHAPES = {
    "embed.weight": (301, 40),
    "a.weight": (64, 33),
    "a.bias": (33,),
    "long": (5000,),
    "scale": (),
    "empty": (0, 3),
    "experts.weight": (6, 20, 10),
}


class Slow(TaskArithmetic):
    """Task arithmetic that sleeps before every block."""

    seconds = 0.04

    def combine(self, block: Block, stats) -> Tensor:
        time.sleep(self.seconds)
        return super().combine(block, stats)


def small_blocks(patch=setattr) -> None:
    """Cut even small tensors into many blocks, and commit often."""
    patch(blocks, "WORKING_BYTES", 1 << 12)
    patch(blocks, "LEAST_ENTRIES", 256)
    patch(work, "LEAST_ENTRIES", 256)
    patch(store, "COMMIT_BYTES", 1 << 12)


def quick_commits(patch=setattr) -> None:
    """Do not wait for the disk: that matters to power failures, not to processes that die."""
    patch(store.Writer, "sync", lambda self: None)


def model(seed: int, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> dict[str, Tensor]:
    """A model's tensors, small enough differences between seeds for signs to agree."""
    return {
        name: (dense(*shape, seed=i) + 0.1 * dense(*shape, seed=1000 * seed + i)).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def write_models(folder: Path, count: int = 3, dtype: torch.dtype = torch.float32, shapes=SHAPES):
    """A base and `count` experts on disk, one of them sharded: their folders."""
    names = ["base", *(f"expert{k}" for k in range(count))]
    for seed, name in enumerate(names):
        tensors = model(seed, dtype, shapes)
        keys = list(tensors)
        shards = [keys[:3], keys[3:]] if seed == 1 and len(keys) > 3 else [keys]
        write_folder(folder / name, *({k: tensors[k] for k in shard} for shard in shards))
    return {name: folder / name for name in names}


def make_plan(
    folders: Mapping[str, Path],
    method: Method | Mapping[str, Method | None] | None,
    dtype: torch.dtype | None = None,
    **options,
) -> Plan:
    """A plan that merges every tensor of the base by one method, or by its own; None copies."""
    checkpoints = {name: Checkpoint.open(folder, name) for name, folder in folders.items()}
    experts = [name for name in checkpoints if name != "base"]
    outputs = []
    for key, entry in checkpoints["base"].tensors.items():
        its = method[key] if isinstance(method, Mapping) else method
        base = None if its is None else Source("base", key)
        sources = tuple(Source(name, key) for name in experts)
        outputs.append(
            Output(key, entry.shape, dtype or entry.dtype, its, base, sources[: None if its else 1])
        )
    return Plan(tuple(outputs), checkpoints, **options)


def hash_folder(folder: Path) -> str:
    """sha256 over names and contents of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def run_job(
    folder: Path, method: str, ranks: tuple[int, int, int] | None = None, fault: str = ""
) -> None:
    """A job in a process of its own: resumes by itself, verifies.

    Args:
        folder: where the models are; the output is `out` there.
        method: "slow", "ties" or "ties each".
        ranks: rank, number of processes and port, as torchrun would tell by the environment.
        fault: "store", the last rank cannot open the output's files; "death", it is killed at its
            first block.
    """
    os.dup2(os.open(folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if ranks is not None:
        names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
        values = (*map(str, ranks), "127.0.0.1")
        os.environ.update(zip(names, values, strict=True))
    small_blocks()
    quick_commits()
    if fault and ranks is not None and ranks[0] == ranks[1] - 1:
        break_process(fault)
    names = ["base", "expert0", "expert1", "expert2"]
    methods = {"slow": Slow(0.3), "ties": Ties(), "ties each": Ties(scope="tensor")}
    plan = make_plan({n: folder / n for n in names}, methods[method], shard_bytes=30_000)
    engine.run(plan, folder / "out", resume=True, verify=True, threads=2)


def break_process(fault: str) -> None:
    """Let this process fail, or die, as `run_job` says."""

    def no_files(*arguments, **keywords):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    if fault == "store":
        store.Writer.__init__ = no_files
    else:
        store.Store.write = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch.distributed", "fastmerge.jobs.engine"])


def start_job(*arguments) -> multiprocessing.Process:
    """`run_job` in a process of its own; torch is imported once for all of them."""
    process = PROCESSES.Process(target=run_job, args=arguments)
    process.start()
    return process
