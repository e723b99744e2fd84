"""`run`: a plan into an output folder, block by block, in bounded memory."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import CheckpointError
from ..checkpoint.layout import Layout, make_layout
from ..checkpoint.writer import (
    OutputLock,
    Writer,
    check_name,
    check_space,
    check_target,
    check_texts,
    end_replacement,
    partial_folder,
    previous_folder,
    publish,
    sync_folder,
    write_error,
    write_texts,
)
from .blocks import Cut, cut, sources_of
from .journal import (
    Journal,
    hash_plan,
    is_ours,
    read_journals,
    remove_journals,
    replaced_names,
)
from .plan import Plan
from .ranks import Ranks
from .store import Store
from .work import Options, Work


def run(
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    max_memory: int = 1 << 30,
    threads: int | None = None,
    device: str = "cpu",
    progress: bool = True,
    allow_nonfinite: bool = False,
) -> None:
    """Run a merge job; the output appears complete or not at all.

    The output's bytes depend on the plan alone: not on threads, memory, processes, or on how often
    the job was interrupted. Under torchrun the processes share the tensors.

    Args:
        plan: what to do.
        out: folder to be made.
        overwrite: replace an earlier output, which stays until the new one is complete.
        resume: go on with a job that was killed, if there is one; else start anew.
        verify: read the output again and compare it with what was computed.
        max_memory: bytes of memory that blocks in work may take, besides the page cache.
        threads: blocks computed at a time, by default as many as torch uses threads, at least 2.
        device: where blocks are computed, "cpu", "cuda" or "cuda:N".
        progress: show progress on a terminal.
        allow_nonfinite: accept NaN and Inf in inputs and output.

    Raises:
        FileExistsError: there is an output already.
        CheckpointError: something about the files: another job writes them, the disk is full, the
            plan is not the one that was interrupted, or verification found a difference.
        ValueError: a device that is not there, a tensor that does not fit its output, NaN or Inf,
            or too little memory.
    """
    out = Path(out)
    threads = max(2, torch.get_num_threads()) if threads is None else threads
    if threads < 1 or max_memory < 1:
        raise ValueError(f"threads and max_memory must be positive, got {threads}, {max_memory}")
    where = check_device(device)
    cuts, layout = check_job(plan, out, max_memory)
    options = Options(max_memory, threads, where, progress, allow_nonfinite)
    ranks = Ranks()
    try:
        _run(plan, out, layout, cuts, options, ranks, overwrite, resume, verify)
    finally:
        ranks.close()


def check_job(plan: Plan, out: Path, max_memory: int) -> tuple[list[Cut], Layout]:
    """Everything that can be checked of a job without looking at the disk: cuts and layout.

    Raises:
        CheckpointError, ValueError: see `run`.
    """
    check_name(out)
    cuts = check_plan(plan)
    check_memory(plan, cuts, max_memory)
    layout = make_layout(
        ((o.name, o.dtype, o.shape) for o in plan.outputs), plan.metadata, plan.shard_bytes
    )
    check_texts(layout, plan.texts)
    return cuts, replace(layout, others=sum(map(len, plan.texts.values())))


def check_place(plan: Plan, out: Path, layout: Layout, overwrite: bool) -> None:
    """Whether the output can go there, now.

    Raises:
        FileExistsError, CheckpointError: there is an output or an input, or too little room.
    """
    check_target(out, overwrite, _inputs(plan))
    check_space(out, layout)


def _inputs(plan: Plan) -> list[Path]:
    return [*plan.folders, *(c.folder for c in plan.checkpoints.values())]


def check_device(name: str) -> torch.device:
    """The device of a job.

    Raises:
        ValueError: neither the CPU nor a GPU that torch finds.
    """
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", name) is None:
        raise ValueError(f"device is {name!r}, expected cpu, cuda or cuda:N")
    device = torch.device(name)
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        raise ValueError(f"device is {name!r}, but torch finds {found or 'no'} GPUs")
    return device


def check_plan(plan: Plan) -> list[Cut]:
    """Check that all sources exist and have the shape of their output; cut the outputs.

    Raises:
        CheckpointError: names output, source, expected and found.
    """
    for output in plan.outputs:
        if output.method is None and (output.base is not None or len(output.experts) != 1):
            raise CheckpointError(f"output {output.name!r} is a copy and needs one source")
        for source in sources_of(output):
            entry = plan.checkpoints[source.checkpoint].tensors.get(source.key)
            if entry is None:
                raise CheckpointError(f"{source.checkpoint}: there is no tensor {source.key!r}")
            if tuple(entry.shape) != tuple(output.shape):
                raise CheckpointError(
                    f"{source.checkpoint}: tensor {source.key!r} has shape {list(entry.shape)}, "
                    f"expected {list(output.shape)} for the output {output.name!r}"
                )
    return [cut(output, plan.checkpoints) for output in plan.outputs]


def needed_memory(plan: Plan, cuts: list[Cut]) -> tuple[int, str]:
    """Memory that the largest block needs, and the output that it belongs to."""
    sizes = [
        (cut.working_bytes, output.name) for cut, output in zip(cuts, plan.outputs, strict=True)
    ]
    return max(sizes, default=(0, ""))


def check_memory(plan: Plan, cuts: list[Cut], max_memory: int) -> None:
    """Raise ValueError, naming the output, if a block needs more than `max_memory` bytes."""
    needed, name = needed_memory(plan, cuts)
    if needed > max_memory:
        pairs = zip(plan.outputs, cuts, strict=True)
        output, cut = next((output, cut) for output, cut in pairs if output.name == name)
        whole = output.method is not None and output.method.needs_whole(output.shape)
        reason = f", since {output.method.name} needs whole tensors" if whole else ""
        if cut.reading_bytes:
            reason += f", {cut.reading_bytes:,} of it to add adapters and line up vocabularies"
        raise ValueError(
            f"max_memory is {max_memory:,} bytes, but output {name!r} of shape "
            f"{list(output.shape)} needs about {needed:,}{reason}"
        )


def _run(
    plan: Plan,
    out: Path,
    layout: Layout,
    cuts: list[Cut],
    options: Options,
    ranks: Ranks,
    overwrite: bool,
    resume: bool,
    verify: bool,
) -> None:
    """The job among its ranks; the first one owns the folder."""
    folder, plan_hash = partial_folder(out), hash_plan(plan)
    if len(set(ranks.gather(plan_hash))) > 1:
        raise CheckpointError("the processes of this job have different plans")
    lock = None
    try:
        prepare = partial(_prepare, plan, out, layout, plan_hash, overwrite, resume)
        lock, complete = _together(ranks, prepare, out, layout)
        if any(ranks.gather(complete)):
            return
        opened: list[Store] = []  # empty on a rank that cannot open it
        try:

            def open_store() -> None:
                done = read_journals(folder)[1]
                opened.append(Store(folder, layout, ranks.rank, verify, done))

            _guarded(open_store, ranks, folder, layout)
            (store,) = opened
            work = Work(plan, cuts, options, ranks, store)
            _guarded(work.run, ranks, folder, layout)
            _guarded(store.commit, ranks, folder, layout)
            if verify:
                check = partial(store.check, plan, cuts, work.mine)
                _guarded(check, ranks, folder, layout, resumable=False)
        finally:
            for store in opened:
                store.close()
        if ranks.rank == 0:
            _guarded(partial(_finish, plan, out, layout), ranks, folder, layout)
        else:
            ranks.agree()
    finally:
        if lock is not None:
            lock.release()


def _finish(plan: Plan, out: Path, layout: Layout) -> None:
    """Make the partial folder the output."""
    folder, previous = partial_folder(out), previous_folder(out)
    write_texts(folder, layout, plan.texts)
    if out.exists():
        journal = Journal(folder, 0)
        try:
            journal.replaces(previous.name)
        finally:
            journal.close()
    sync_folder(folder)
    publish(folder, out, previous)
    remove_journals(out)


def _together(
    ranks: Ranks, action: Callable, out: Path, layout: Layout
) -> tuple[OutputLock | None, bool]:
    """Let the first rank do something that all depend on."""
    result: tuple[OutputLock | None, bool] = (None, False)
    failure = None
    try:
        if ranks.rank == 0:
            result = action()
    except BaseException as error:
        failure = _named(error, out, layout)
    ranks.agree(failure)
    return result


def _guarded(
    action: Callable[[], None],
    ranks: Ranks,
    folder: Path,
    layout: Layout,
    resumable: bool = True,
) -> None:
    """Do something on all ranks. What is wrong with the data leaves nothing behind; a failure of
    the machine leaves what is needed to resume."""
    failure = None
    try:
        action()
    except BaseException as error:
        failure = _named(error, folder, layout)
    try:
        ranks.agree(failure)
    except BaseException as error:
        data = isinstance(error, ValueError) and not isinstance(error, CheckpointError)
        if ranks.rank == 0 and (data or not resumable):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, CheckpointError) and resumable:
            raise CheckpointError(
                f"{error}; what was finished is kept in {folder}, resume to go on"
            ) from error
        raise


def _named(error: BaseException, path: Path, layout: Layout) -> BaseException:
    """An error of the system as one that says what the output needs; others as they are."""
    if isinstance(error, OSError) and not isinstance(error, FileExistsError):
        return write_error(path, layout.size, error)
    return error


def _prepare(
    plan: Plan, out: Path, layout: Layout, plan_hash: str, overwrite: bool, resume: bool
) -> tuple[OutputLock, bool]:
    """Take the lock and make the partial folder, or find the one to go on with.

    Returns:
        The lock, and whether the output is complete already.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = OutputLock(out)
    try:
        folder = partial_folder(out)
        end_replacement(out, replaced_names(folder), replaced_names(out))
        published = out.is_dir() and read_journals(out)[0]
        if published:  # killed between its last two steps
            remove_journals(out)
            if resume and published == plan_hash and not folder.exists():
                return lock, True
        check_target(out, overwrite, _inputs(plan))
        if folder.exists() and _goes_on(folder, plan_hash, resume):
            return lock, False
        folder.mkdir()
        journal = Journal(folder, 0)
        try:
            journal.claim()
            Writer(folder, layout, create=True).close()
            journal.begin(plan_hash)
            sync_folder(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            journal.close()
        return lock, False
    except BaseException:
        lock.release()
        raise


def _goes_on(folder: Path, plan_hash: str, resume: bool) -> bool:
    """Whether a partial folder is the beginning of this job; removed if it shall not be used."""
    if folder.is_symlink() or not folder.is_dir() or not (is_ours(folder) or _is_bare(folder)):
        raise CheckpointError(f"{folder}: in the way, and not made by a merge job; remove it")
    found, _ = read_journals(folder)
    if resume and found is not None:
        if found != plan_hash:
            raise CheckpointError(
                f"{folder}: the interrupted job had another recipe, other inputs or another "
                "version of fastmerge; start without resume to begin anew"
            )
        return True
    shutil.rmtree(folder)
    return False


def _is_bare(folder: Path) -> bool:
    """Whether a folder holds nothing but what a kill right after making it leaves."""
    return all(
        path.name == ".journal.0.jsonl" and path.stat().st_size == 0 for path in folder.iterdir()
    )
