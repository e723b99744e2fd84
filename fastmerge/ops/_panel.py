"""The panel strategy of `merged_linear`: combine rows of W into reused scratch, multiply, go on.

Per panel the backward pass computes dW_p by GEMM into scratch, reads the deltas once for the
merged panel and the K inner products (`combine_and_dot`), and adds dY_p W_p to dX. So no merged
weight, no weight gradient and no per-expert temporary ever exists whole.

On a GPU the deltas are read on a second stream beside the GEMM of the neighbouring panel: two
scratch panels take turns.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

# A GEMM packs its activations anew for every panel: in a panel of fewer than about 768 rows of the
# weight that costs 4 to 25 % at thousands of rows of activations, more than a larger panel loses by
# leaving the second-level cache. Two panels are the scratch of a backward pass.
CPU_PANEL_BYTES = 12 << 20
ROW_MULTIPLE = 64  # an odd number of rows costs the GEMM's inner kernel up to 20 %

_scratch = threading.local()


class PanelLinear:
    """One merged linear layer, panel by panel.

    Args:
        kernels: module with weighted_sum, combine_and_dot and coefficient_grad for the device.
        base: [rows, width] contiguous; its rows are cut into panels.
        deltas: K tensors like base, contiguous.
        coefficients: fp32 [K] on base's device.
        experts: whether deltas are experts.
        transpose: False: y = x W^T, panels are columns of y. True: y = x W, panels are columns
            of x and their products add up.
        dtype: dtype of the GEMMs.
        panel_bytes: size of one panel; by default from the device's cache.
    """

    def __init__(
        self,
        kernels: ModuleType,
        base: Tensor,
        deltas: Sequence[Tensor],
        coefficients: Tensor,
        experts: bool,
        transpose: bool,
        dtype: torch.dtype,
        panel_bytes: int | None = None,
    ):
        self.kernels, self.base, self.deltas = kernels, base, deltas
        self.coefficients, self.experts = coefficients, experts
        self.transpose, self.dtype = transpose, dtype
        width = base.shape[1]
        budget = panel_bytes or device_panel_bytes(base.device)
        self.step = even_step(base.shape[0], budget // max(1, width * dtype.itemsize))
        self.spans = [
            (start, min(base.shape[0], start + self.step))
            for start in range(0, base.shape[0], self.step)
        ]
        self.ahead = base.is_cuda and len(self.spans) > 1

    def scratch_bytes(self) -> int:
        """Bytes of merged weight and weight gradient that a backward pass holds at most.

        Two panels, four on a GPU, where the next one is prepared meanwhile.
        """
        rows = min(self.step, self.base.shape[0])
        return 2 * (1 + self.ahead) * rows * self.base.shape[1] * self.dtype.itemsize

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [R, O] of x [R, I]."""
        if self.transpose:
            total = None
            for (start, stop), panel in self._panels(self._combine):
                total = add_product(total, x[:, start:stop], panel)
            if total is None:
                total = x.new_zeros(x.shape[0], self.base.shape[1], dtype=torch.float32)
            return (total if bias is None else total.add_(bias)).to(self.dtype)
        y = x.new_empty(x.shape[0], self.base.shape[0])
        for (start, stop), panel in self._panels(self._combine):
            if bias is None:
                torch.mm(x, panel.t(), out=y[:, start:stop])
            else:
                torch.addmm(bias[start:stop], x, panel.t(), out=y[:, start:stop])
        return y

    def backward(
        self, dy: Tensor, x: Tensor, need_x: bool, need_coefficients: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dX [R, I] in the GEMMs' dtype and dlambda fp64 [K], each None if not needed."""
        dots: list[Tensor] = []

        def grad_weight(start: int, stop: int, out: Tensor) -> None:
            left, right = (x[:, start:stop], dy) if self.transpose else (dy[:, start:stop], x)
            torch.mm(left.t(), right, out=out)

        def combine(start: int, stop: int, out: Tensor, grad: Tensor | None) -> None:
            base, panel = self._rows(start, stop)
            if not need_x:
                origin = [base] if self.experts else None
                dots.append(self.kernels.coefficient_grad([grad], origin, [panel])[0])
            elif need_coefficients:
                dots.append(
                    self.kernels.combine_and_dot(
                        base, panel, self.coefficients, grad, out, self.experts
                    )
                )
            else:
                self._combine(start, stop, out, None)

        dx = total = None
        if need_x and self.transpose:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        prepare = grad_weight if need_coefficients else None
        for (start, stop), panel in self._panels(combine, prepare):
            if need_x and self.transpose:
                torch.mm(dy, panel.t(), out=dx[:, start:stop])
            elif need_x:
                total = add_product(total, dy[:, start:stop], panel)
        if need_x and not self.transpose:
            dx = torch.zeros_like(x) if total is None else total.to(self.dtype)
        if not need_coefficients:
            return dx, None
        if len(dots) == 1:
            return dx, dots[0]
        return dx, torch.stack(dots).sum(0) if dots else torch.zeros_like(self.coefficients)

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Base and deltas of a panel."""
        if len(self.spans) == 1:
            return self.base, self.deltas
        return self.base[start:stop], [d[start:stop] for d in self.deltas]

    def _combine(self, start: int, stop: int, out: Tensor, grad: None) -> None:
        base, panel = self._rows(start, stop)
        rows = self.coefficients.view(1, -1)
        self.kernels.weighted_sum([base], [panel], rows, [out], self.experts)

    def _panels(
        self, combine: Callable, prepare: Callable | None = None
    ) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Each span with its merged panel: `prepare` fills a gradient panel, `combine` reads it."""
        if self.ahead:
            yield from self._panels_ahead(combine, prepare)
            return
        weight = self._buffer("weight0")
        grad = self._buffer("grad0") if prepare else None
        for start, stop in self.spans:
            part, out = None, weight[: stop - start]
            if prepare:
                part = grad[: stop - start]
                prepare(start, stop, part)
            combine(start, stop, out, part)
            yield (start, stop), out

    def _panels_ahead(
        self, combine: Callable, prepare: Callable | None
    ) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """The same, where `combine` of the next panel runs on a second stream while the caller
        works on this one."""
        weights = [self._buffer(f"weight{i}") for i in range(2)]
        grads = [self._buffer(f"grad{i}") for i in range(2)] if prepare else [None] * 2
        side = _SideStream(self.base.device)

        def begin(i: int) -> None:
            start, stop = self.spans[i]
            grad = grads[i % 2]
            if prepare:
                grad = grad[: stop - start]
                prepare(start, stop, grad)
            with side.work(i % 2, after_caller=prepare is not None):
                combine(start, stop, weights[i % 2][: stop - start], grad)

        begin(0)
        for i, (start, stop) in enumerate(self.spans):
            if i + 1 < len(self.spans):
                begin(i + 1)
            side.wait(i % 2)
            yield (start, stop), weights[i % 2][: stop - start]
            side.release(i % 2)
        side.join()

    def _buffer(self, slot: str) -> Tensor:
        """Memory for one panel; on the CPU reused by every layer of this thread."""
        rows, width = min(self.step, self.base.shape[0]), self.base.shape[1]
        if self.base.device.type != "cpu":
            return torch.empty(rows, width, dtype=self.dtype, device=self.base.device)
        return scratch_panel(slot, rows, width, self.dtype)


class _SideStream:
    """A second CUDA stream that fills two scratch panels in turn, ordered by events.

    Everything it touches was allocated on the caller's stream or is joined with it at the end, so
    freed memory is never reused too early. Events and waits are capturable in a CUDA graph.
    """

    _streams: ClassVar[dict[int, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device):
        self.caller = torch.cuda.current_stream(device)
        index = self.caller.device.index
        if index not in self._streams:
            self._streams[index] = torch.cuda.Stream(device)
        self.side = self._streams[index]
        self.side.wait_stream(self.caller)
        self.ready: dict[int, torch.cuda.Event] = {}
        self.free: dict[int, torch.cuda.Event] = {}

    @contextlib.contextmanager
    def work(self, turn: int, after_caller: bool) -> Iterator[None]:
        """Run on the side once panel `turn` is free, and after the caller's work if it is read."""
        if turn in self.free:
            self.side.wait_event(self.free.pop(turn))
        if after_caller:
            self.side.wait_event(self.caller.record_event())
        with torch.cuda.stream(self.side):
            yield
        self.ready[turn] = self.side.record_event()

    def wait(self, turn: int) -> None:
        """The caller's next work comes after panel `turn` is filled."""
        self.caller.wait_event(self.ready.pop(turn))

    def release(self, turn: int) -> None:
        """The caller has used panel `turn`; it may be filled again."""
        self.free[turn] = self.caller.record_event()

    def join(self) -> None:
        """The caller's next work comes after everything on the side."""
        self.caller.wait_stream(self.side)


def device_panel_bytes(device: torch.device) -> int:
    """Bytes of one panel: two panels and the deltas passing by should fit the GPU's L2 cache."""
    if device.type != "cuda":
        return CPU_PANEL_BYTES
    return max(1 << 20, torch.cuda.get_device_properties(device).L2_cache_size // 4)


def scratch_panel(slot: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Memory [rows, width] on the CPU that every layer of this thread reuses, one for each slot."""
    buffers = _scratch.__dict__
    key = (slot, dtype)
    if key not in buffers or buffers[key].numel() < rows * width:
        buffers[key] = torch.empty(rows * width, dtype=dtype)
    return buffers[key][: rows * width].view(rows, width)


def even_step(rows: int, most: int) -> int:
    """Rows of each panel, about `most`: nearly equal panels of a multiple the GEMM likes."""
    panels = max(1, -(-rows // max(1, most)))
    step = max(1, -(-rows // panels))
    rounded = -(-step // ROW_MULTIPLE) * ROW_MULTIPLE
    return rounded if rounded <= max(most, ROW_MULTIPLE) else step


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in fp32. 16-bit products are rounded by the GEMM, their sum only at the end."""
    if total is None:
        return (a @ b).float()
    return total.addmm_(a, b) if a.dtype == torch.float32 else total.add_(a @ b)
