"""An output folder that appears complete or not at all.

Everything is written into `.NAME.partial` beside the output and renamed at the end. Files have
their full size from the beginning, so that a full disk is noticed before any work; blocks go to
their place in any order, from any thread or process.

An earlier output that is replaced waits beside as `.NAME.previous-TOKEN` for a moment. The token is
drawn anew each time and the journal tells it first, so that no folder of another's is ever taken
for ours.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .direct import Buffer, OutputFile
from .errors import CheckpointError
from .layout import INDEX, Layout


class OutputLock:
    """The right to write one output folder, held by one job at a time.

    Args:
        out: the output folder.

    Raises:
        CheckpointError: another job is writing it, or there is a file of another's in its place.
    """

    def __init__(self, out: Path):
        self.path = out.with_name(f".{out.name}.lock")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            self._descriptor = os.open(self.path, flags, 0o644)
            if os.fstat(self._descriptor).st_size:
                os.close(self._descriptor)
                raise CheckpointError(f"{self.path}: in the way, and not made by a merge job")
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._descriptor)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise CheckpointError(f"{out}: another job is writing this output") from None
            if self._is_current():
                return
            os.close(self._descriptor)  # its last holder removed the file while we opened it

    def release(self) -> None:
        """Give the right back."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


def partial_folder(out: Path) -> Path:
    """Where an output is written until it is complete."""
    return out.with_name(f".{out.name}.partial")


def previous_folder(out: Path) -> Path:
    """Where an earlier output can wait while the new one takes its place: a new name each time."""
    return out.with_name(f".{out.name}.previous-{secrets.token_hex(8)}")


def check_name(out: Path) -> None:
    """Raise CheckpointError for a path that is no name, such as `.` or `/`."""
    if out.name in ("", ".."):
        raise CheckpointError(f"{out}: not the name of a folder to be made")


def check_space(out: Path, layout: Layout) -> None:
    """Raise CheckpointError if the disk that a folder is, or will be, on has no room for it."""
    places = (out, *out.absolute().parents)
    free = shutil.disk_usage(next(place for place in places if place.exists())).free
    if layout.size > free:
        raise CheckpointError(f"{out}: the output needs {layout.size:,} bytes, {free:,} are free")


def check_target(out: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise before anything is written if the output cannot go there.

    Args:
        out: the output folder.
        overwrite: whether an earlier output may be replaced.
        inputs: folders that must stay as they are.

    Raises:
        FileExistsError: there is something already.
        CheckpointError: an input is in the way.
    """
    check_name(out)
    real = out.resolve()
    for folder in inputs:
        if folder.resolve() == real or real in folder.resolve().parents:
            raise CheckpointError(f"{out}: the input {folder} is there; write somewhere else")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise FileExistsError(f"{out}: exists and is no folder")
    if os.path.ismount(out):
        raise CheckpointError(f"{out}: a mount point; write to a folder in it")
    if out.exists() and not overwrite and any(out.iterdir()):
        raise FileExistsError(f"{out}: exists; overwrite it explicitly or write somewhere else")
    if out.exists() and any(out.iterdir()) and not any(out.glob("*.safetensors")):
        raise FileExistsError(f"{out}: exists and is no earlier output; write somewhere else")


def end_replacement(out: Path, before: Collection[str], after: Collection[str]) -> None:
    """Undo or finish a replacement that was interrupted.

    Args:
        out: the output folder.
        before: names for an earlier output, told by the journal of the partial folder: the new
            output did not take its place, so that it comes back.
        after: those told by the journal of the output itself, which has taken its place.

    Raises:
        CheckpointError: something else is where the earlier output was.
    """
    pattern = re.compile(rf"\.{re.escape(out.name)}\.previous-[0-9a-f]{{16}}")
    waiting = [out.with_name(name) for name in (*before, *after) if pattern.fullmatch(name)]
    for previous in waiting:
        if previous.is_symlink() or not previous.is_dir():
            continue
        if previous.name in after:
            shutil.rmtree(previous)
        elif not out.exists() or (out.is_dir() and not any(out.iterdir())):
            previous.rename(out)  # in place of an empty folder as well
        else:
            raise CheckpointError(
                f"{out}: was made anew after a job had been interrupted; the earlier output is in "
                f"{previous}, move one of them away"
            )


def publish(partial: Path, out: Path, previous: Path) -> None:
    """Make a complete partial folder the output.

    Args:
        partial: the folder.
        out: the output folder, which may have an earlier output.
        previous: where that waits meanwhile; the partial folder's journal tells of it.
    """
    if out.exists():
        out.rename(previous)
    try:
        partial.rename(out)
    except OSError:
        if previous.exists():
            previous.rename(out)
        raise
    sync_folder(out.parent)
    if previous.exists():
        shutil.rmtree(previous)


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write small files to, which becomes `out` if the body succeeds.

    Raises:
        FileExistsError: something else is at `out`.
    """
    check_target(out, overwrite)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        partial = place / "new"
        partial.mkdir()
        yield partial
        publish(partial, out, place / "previous")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make sure that names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Writer:
    """Blocks of tensors into the files of a layout.

    Args:
        folder: where the files are, or will be.
        layout: the files.
        create: make the files at their full size with their headers; else they are there.

    Raises:
        CheckpointError: the disk is too full, with what is needed and what is free.
    """

    def __init__(self, folder: Path, layout: Layout, create: bool):
        self.folder, self.layout = folder, layout
        self._files: list[OutputFile] = []
        buffer = Buffer()
        try:
            if create:
                check_space(folder, layout)
            for shard in layout.shards:
                self._files.append(OutputFile(folder / shard.name, create, buffer))
                if create:
                    self._create(len(self._files) - 1)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, start_row: int, values: Tensor) -> None:
        """Write rows of a tensor to their place.

        Args:
            name: the tensor.
            start_row: the first row.
            values: contiguous CPU tensor of whole rows, in the tensor's dtype.
        """
        number, extent = self.layout.places[name]
        rows = extent.shape[0] if extent.shape else 1
        start = extent.start + start_row * ((extent.stop - extent.start) // max(rows, 1))
        if start + values.nbytes > extent.stop:
            raise IndexError(f"tensor {name!r} has {rows} rows")
        self._pwrite(number, as_bytes(values), start)

    def read(self, name: str, start_row: int, rows: int) -> bytes:
        """The bytes of rows of a tensor as they are in the file."""
        number, extent = self.layout.places[name]
        size = (extent.stop - extent.start) // max(extent.shape[0] if extent.shape else 1, 1)
        return os.pread(
            self._files[number].descriptor, rows * size, extent.start + start_row * size
        )

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        for number, file in enumerate(self._files):
            self._guarded(number, os.fdatasync, file.descriptor)

    def forget(self) -> None:
        """Drop the files from the system's cache, so that reading asks the disk."""
        for file in self._files:
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.pop().close()

    def _create(self, number: int) -> None:
        shard, descriptor = self.layout.shards[number], self._files[number].descriptor
        os.ftruncate(descriptor, 0)
        self._guarded(number, os.posix_fallocate, descriptor, 0, shard.size)
        self._pwrite(number, memoryview(shard.header), 0)

    def _pwrite(self, number: int, data: memoryview, offset: int) -> None:
        while data:
            count = self._guarded(number, self._files[number].write, data, offset)
            data, offset = data[count:], offset + count

    def _guarded(self, number: int, function, *arguments):
        """Call a function of the system; say what was needed if it fails."""
        try:
            return function(*arguments)
        except OSError as error:
            path = self.folder / self.layout.shards[number].name
            raise write_error(path, self.layout.size, error) from error


def write_error(path: Path, needed: int, error: OSError) -> CheckpointError:
    """The error of a write that failed, with what the output needs."""
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror or error}; the output needs {needed:,} bytes, "
        f"{free:,} are free now"
    )


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(values.reshape(-1).view(torch.uint8).numpy())


def write_text(path: Path, contents: bytes) -> None:
    """A small file, on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


def check_texts(layout: Layout, names: Iterable[str]) -> None:
    """Raise CheckpointError for a text file's name that is none, or that is taken."""
    taken = {INDEX, "", ".", "..", *(shard.name for shard in layout.shards)}
    for name in names:
        if name in taken or name != os.path.basename(name) or "\0" in name:
            raise CheckpointError(f"output: {name!r} cannot be the name of a text file")


def write_texts(folder: Path, layout: Layout, texts: Mapping[str, bytes]) -> None:
    """Write the index and the other small files of an output."""
    for name, contents in texts.items():
        write_text(folder / name, contents)
    if layout.index is not None:
        write_text(folder / INDEX, layout.index)
