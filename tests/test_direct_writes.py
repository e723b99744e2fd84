"""Output files written past the system's cache: every byte in its place, whatever the disk does."""

from __future__ import annotations

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmerge.checkpoint.direct import ALIGNMENT, BUFFER_BYTES, LEAST_BYTES
from fastmerge.checkpoint.layout import make_layout
from fastmerge.checkpoint.writer import Writer

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="a system without them")

# One longer than a buffer; ends, and with them beginnings, in the middle of pages; some too short.
SIZES = (1, BUFFER_BYTES + 3 * ALIGNMENT + 5, LEAST_BYTES - 1, 3, LEAST_BYTES + ALIGNMENT, 7000)


def write(folder: Path) -> tuple[dict[str, torch.Tensor], Writer]:
    """Write tensors in two pieces each, from two threads; the file is not closed."""
    tensors = {
        f"t{number}": torch.randint(0, 256, (size,), dtype=torch.uint8)
        for number, size in enumerate(SIZES)
    }
    layout = make_layout(((n, t.dtype, tuple(t.shape)) for n, t in tensors.items()), {}, 1 << 40)
    writer = Writer(folder, layout, create=True)
    with ThreadPoolExecutor(2) as pool:
        for name, tensor in tensors.items():
            middle = min(len(tensor), 100)
            pool.submit(writer.write, name, middle, tensor[middle:]).result()
            pool.submit(writer.write, name, 0, tensor[:middle]).result()
    return tensors, writer


def check(folder: Path) -> None:
    tensors, writer = write(folder)
    read = {name: writer.read(name, 0, len(tensor)) for name, tensor in tensors.items()}
    writer.sync()
    writer.close()
    found = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
        assert read[name] == tensor.numpy().tobytes(), name


def write_all(real, descriptor, data, offset):
    return real(descriptor, data, offset)


def watch(monkeypatch, change=write_all):
    """Count direct writes, and let `change` stand for them."""
    real, sizes = os.pwrite, []

    def pwrite(descriptor, data, offset):
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return real(descriptor, data, offset)
        sizes.append(len(data))
        return change(real, descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return sizes


def test_large_pieces_go_straight_to_the_disk(tmp_path, monkeypatch):
    sizes = watch(monkeypatch)
    check(tmp_path)
    assert all(size % ALIGNMENT == 0 for size in sizes)
    assert sum(sizes) > 0.9 * sum(SIZES) or not _has_direct(tmp_path)


def test_a_disk_that_refuses_direct_writes(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    sizes = watch(monkeypatch, refuse)
    check(tmp_path)
    assert len(sizes) == 1 or not _has_direct(tmp_path)


def test_a_file_system_without_direct_writes(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    sizes = watch(monkeypatch)
    check(tmp_path)
    assert not sizes


def test_direct_writes_that_end_early(tmp_path, monkeypatch):
    """In the middle of a page too, as on a disk whose blocks are shorter."""

    def shorten(real, descriptor, data, offset):
        real(descriptor, data, offset)
        return min(len(data), 3 * ALIGNMENT // 2)

    sizes = watch(monkeypatch, shorten)
    check(tmp_path)
    assert len(sizes) > 10 or not _has_direct(tmp_path)


def _has_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True
