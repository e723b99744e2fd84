"""How tensors are cut into blocks of rows, and how a block is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..methods import Block
from .plan import Output, Plan, Source

# What computing one block takes at most: fp32 copies of everything it reads and writes, scratch. It
# depends on nothing but K, so that sums over blocks, and with them the output's bytes, depend
# neither on the machine nor on the budget.
WORKING_BYTES = 64 << 20
LEAST_ENTRIES = 1 << 16
SCRATCH_TENSORS = 3  # the result, and what methods may allocate besides a copy of every input

NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut.

    Attributes:
        rows: rows of a block.
        count: number of blocks, 0 for a tensor without entries.
        total: the tensor's rows.
        entries: its entries.
        sources: tensors read for it.
        read_bytes: bytes read for it in one pass.
        itemsize: of the dtype of the arithmetic.
        reading_bytes: memory that reading a block takes besides what is read, for sources that are
            computed from what is stored.
    """

    rows: int
    count: int
    total: int
    entries: int
    sources: int
    read_bytes: int
    itemsize: int
    reading_bytes: int = 0

    def bounds(self, number: int) -> tuple[int, int]:
        """First row of a block and the first row behind it."""
        return number * self.rows, min((number + 1) * self.rows, self.total)

    @property
    def working_bytes(self) -> int:
        """Memory that computing one block may take, besides the page cache."""
        entries = -(-self.entries // max(self.total, 1)) * min(self.rows, self.total)
        return entries * (self.sources + SCRATCH_TENSORS) * self.itemsize + self.reading_bytes


def sources_of(output: Output) -> tuple[Source, ...]:
    """The stored tensors that an output is made from."""
    return output.experts if output.base is None else (output.base, *output.experts)


def cut(output: Output, checkpoints: Mapping[str, Checkpoint]) -> Cut:
    """Cut a tensor into blocks of whole rows, or leave it whole if its method asks for that."""
    sources = sources_of(output)
    total = output.shape[0] if output.shape else 1
    entries = math.prod(output.shape)
    room = WORKING_BYTES // 4 // (len(sources) + SCRATCH_TENSORS)
    room = max(1 << max(room, 1).bit_length() - 1, LEAST_ENTRIES)
    rows = max(1, room // max(entries // max(total, 1), 1))
    if output.method is not None and output.method.needs_whole(output.shape):
        rows = max(total, 1)
    stored = [checkpoints[s.checkpoint].tensors[s.key] for s in sources]
    read = sum(entry.nbytes for entry in stored)
    itemsize = 8 if any(entry.dtype == torch.float64 for entry in stored) else 4
    count = -(-total // rows) if entries else 0
    height = min(rows, total)
    reading = [checkpoints[s.checkpoint].reading_bytes(s.key, height) for s in sources]
    return Cut(rows, count, total, entries, len(sources), read, itemsize, max(reading))


class Reader:
    """Blocks of a plan's tensors.

    Args:
        plan: the plan.
        device: where blocks are needed.
    """

    def __init__(self, plan: Plan, device: torch.device):
        self.plan, self.device = plan, device

    def read(self, output: Output, cut: Cut, number: int, check: bool) -> Block:
        """One block of an output's sources.

        Args:
            output: the tensor.
            cut: how it is cut.
            number: which block.
            check: whether to look for NaN and Inf.

        Raises:
            ValueError: NaN or Inf, with checkpoint, tensor and how many.
        """
        start, stop = cut.bounds(number)
        tensors = []
        for source in sources_of(output):
            values = self.plan.checkpoints[source.checkpoint].read(source.key, start, stop)
            if values.dtype in NARROW and output.method is not None:
                values = values.float()
            if check:
                self._check_finite(source, values)
            tensors.append(values)
        experts = tensors if output.base is None else tensors[1:]
        experts = _one_dtype(experts)
        base = None if output.base is None else tensors[0]
        if self.device.type == "cuda":
            base, experts = _to_device(base, experts, self.device)
        offset = start * (cut.entries // max(cut.total, 1))
        return Block(output.name, base, experts, offset, output.dtype, self.plan.seed)

    def release(self, output: Output, cut: Cut, first: int, behind: int) -> None:
        """Give up the memory of the sources of blocks [first, behind)."""
        start, stop = cut.bounds(first)[0], cut.bounds(behind - 1)[1]
        for source in sources_of(output):
            self.plan.checkpoints[source.checkpoint].release(source.key, start, stop)

    def prefetch(self, output: Output, cut: Cut, number: int) -> None:
        """Let the system read a block, if there is one, while others are computed."""
        if number < cut.count:
            start, stop = cut.bounds(number)
            for source in sources_of(output):
                self.plan.checkpoints[source.checkpoint].prefetch(source.key, start, stop)

    def _check_finite(self, source: Source, values: Tensor) -> None:
        if is_finite(values):
            return
        count = int((~torch.isfinite(values.float())).sum())
        entry = self.plan.checkpoints[source.checkpoint].tensors[source.key]
        raise ValueError(
            f"{source.checkpoint}: tensor {source.key!r} in {entry.file} has NaN or Inf entries, "
            f"{count} in the block that was read; allow_nonfinite accepts them"
        )


def is_finite(values: Tensor) -> bool:
    """Whether there is no NaN or Inf: one read, since NaN reaches both extremes, Inf one."""
    if values.dtype in NARROW:
        values = values.float()
    if not values.is_floating_point() or values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low) and math.isfinite(high)


def _one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _to_device(
    base: Tensor | None, experts: Sequence[Tensor], device: torch.device
) -> tuple[Tensor | None, list[Tensor]]:
    """Copies on a GPU, by way of pinned memory, on the worker's own stream.

    Every worker has one block in flight; while one waits for its copies another computes. torch's
    allocator of pinned memory keeps buffers for the next block, and gives none away before the copy
    that reads it is done: it records an event behind each.
    """

    def copy(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    return None if base is None else copy(base), [copy(expert) for expert in experts]
