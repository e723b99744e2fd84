"""The grouped strategy of `merged_linear` on a CPU: rows with equal coefficients share a panel.

Small groups of fp32 rows go through one kernel, `grouped_linear`, that merges a tile and multiplies
it before it leaves the cache. Elsewhere a panel of base and deltas is read once from memory and
combined for one group of rows after the other, several at a time, and each product is a vendor GEMM
over its group. So one task per sample costs about what the plain product does, and a weight per
sample K multiply-adds an entry more.

A panel is a range along the longer side of the weight: short panels that are thin the other way
would leave a GEMM over few rows of activations little to reuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ._groups import Groups
from ._panel import scratch_panel

# Panels of as many groups at once as a layer's panels take elsewhere: every batch reads the panel's
# base and deltas again, and a GEMM over less than about 128 entries of the weight's longer side
# loses more than scratch in the second-level cache would gain.
BATCH_BYTES = 12 << 20
LEAST_ENTRIES = 128
MULTIPLE = 64
# Rows a group, on average, up to which merged tiles in the cache gain more than a vendor's GEMM.
FUSED_ROWS = 128


class GroupedLinear:
    """One merged linear layer whose rows of activations come in groups.

    Args:
        kernels: module with combine_rows and grouped_linear.
        base: [rows, width] contiguous.
        deltas: K tensors like base, contiguous.
        groups: rows of activations by coefficients, which are fp32.
        experts: whether deltas are experts.
        transpose: False: y = x W^T. True: y = x W.
        dtype: dtype of the GEMMs.
    """

    def __init__(
        self,
        kernels: ModuleType,
        base: Tensor,
        deltas: Sequence[Tensor],
        groups: Groups,
        experts: bool,
        transpose: bool,
        dtype: torch.dtype,
    ):
        self.kernels, self.base, self.deltas, self.groups = kernels, base, deltas, groups
        self.experts, self.transpose, self.dtype = experts, transpose, dtype
        self.coefficients = groups.coefficients.contiguous()
        self.axis = 0 if base.shape[0] >= base.shape[1] else 1
        self.by_outputs = (self.axis == 0) != transpose  # whether a panel is some outputs' weights
        self.width = base.shape[1 - self.axis]
        entry = max(1, self.width * dtype.itemsize)
        count = max(1, len(groups.sizes))
        long = base.shape[self.axis]
        room = BATCH_BYTES // (entry * count) // MULTIPLE * MULTIPLE
        self.step = max(1, min(long, max(LEAST_ENTRIES, room)))
        self.batch = min(count, max(1, BATCH_BYTES // (entry * self.step)))
        self.spans = [(i, min(long, i + self.step)) for i in range(0, long, self.step)]
        self.rows = groups.spans()
        equal = len(set(groups.sizes)) == 1
        self.size = groups.sizes[0] if equal else None
        small = sum(groups.sizes) <= FUSED_ROWS * count
        self.fused = small and dtype == torch.float32 and kernels.fuses_multiply_add()

    def scratch_bytes(self) -> int:
        """Bytes of merged weights and weight gradients that a backward pass holds at most."""
        return 2 * self.batch * self.step * self.width * self.dtype.itemsize

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [R, O] of x [R, I]."""
        used = (self.coefficients != 0).any(0).nonzero().flatten()  # others need not be read
        deltas = [self.deltas[k] for k in used.tolist()]
        coefficients = self.coefficients[:, used].contiguous()
        if self.fused:
            return self._multiply_tiles(x, deltas, coefficients, bias, self.transpose)
        x = self.groups.gather(x)
        total = self._total(x, self.base.shape[1 if self.transpose else 0], self.by_outputs)
        for span in self.spans:
            for part, weights in self._combined(span, deltas, coefficients):
                self._multiply(total, x, weights.mT, span, part, self.by_outputs)
                if bias is not None and self.by_outputs:
                    rows = self._rows(part)
                    total[rows, slice(*span)] += bias[slice(*span)]
        if bias is not None and not self.by_outputs:
            total += bias
        return self.groups.scatter(total.to(self.dtype))

    def backward(
        self, dy: Tensor, x: Tensor, need_x: bool, need_coefficients: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dX [R, I] in the GEMMs' dtype and dlambda fp64 [G, K], each None if not needed."""
        dx = None
        if need_x and self.fused:
            dx = self._multiply_tiles(dy, self.deltas, self.coefficients, None, not self.transpose)
            if not need_coefficients:
                return dx, None
            need_x = False
        dy, x = self.groups.gather(dy), self.groups.gather(x)
        total = self._total(dy, x.shape[1], not self.by_outputs) if need_x else None
        dots = torch.zeros(self.coefficients.shape, dtype=torch.float64)
        for span in self.spans:
            grads = (dy, x, dots) if need_coefficients else None
            panels = self._combined(span, self.deltas, self.coefficients, grads, need_x)
            for part, weights in panels:
                if need_x:
                    self._multiply(total, dy, weights, span, part, not self.by_outputs)
        if need_x:
            dx = self.groups.scatter(total.to(self.dtype))
        return dx, dots if need_coefficients else None

    def _multiply_tiles(
        self,
        rows: Tensor,
        deltas: Sequence[Tensor],
        coefficients: Tensor,
        bias: Tensor | None,
        transpose: bool,
    ) -> Tensor:
        """rows_g W_g^T + bias, or rows_g W_g with `transpose`, without a merged panel."""
        return self.kernels.grouped_linear(
            rows if rows.stride(1) == 1 else rows.contiguous(),
            self.base,
            deltas,
            coefficients,
            self.groups.sizes,
            self.groups.order,
            None if bias is None else bias.contiguous(),
            self.experts,
            transpose,
        )

    def _combined(
        self,
        span: tuple[int, int],
        deltas: Sequence[Tensor],
        coefficients: Tensor,
        grads: tuple[Tensor, Tensor, Tensor] | None = None,
        need_weights: bool = True,
    ) -> Iterator[tuple[tuple[int, int], Tensor | None]]:
        """Batches of groups with their panels [g, O, I]; adds to `dots` of (dy, x, dots)."""
        base, *deltas = (
            t.narrow(self.axis, span[0], span[1] - span[0]) for t in (self.base, *deltas)
        )
        for first in range(0, len(self.rows), self.batch):
            part = first, min(len(self.rows), first + self.batch)
            out = self._scratch("weight0", part, base) if need_weights else None
            grad = None
            if grads is not None:
                grad = self._scratch("grad0", part, base)
                self._grad_panels(*grads[:2], span, part, grad)
            if need_weights or grad is not None:
                lam = coefficients[slice(*part)]
                found = self.kernels.combine_rows(base, deltas, lam, out, grad, self.experts)
                if found is not None:
                    grads[2][slice(*part)] += found
            yield part, out.mT if need_weights and self.transpose else out

    def _scratch(self, slot: str, part: tuple[int, int], panel: Tensor) -> Tensor:
        """Memory for a panel [g, rows, width] of each group."""
        count, (rows, width) = part[1] - part[0], panel.shape
        return scratch_panel(slot, count * rows, width, self.dtype).view(count, rows, width)

    def _grad_panels(
        self, dy: Tensor, x: Tensor, span: tuple[int, int], part: tuple[int, int], out: Tensor
    ) -> None:
        """dW of each group over a panel, as the weight is stored."""
        sides = [x, dy] if self.transpose else [dy, x]
        sides[self.axis] = sides[self.axis][:, slice(*span)]
        if self.size is not None:
            left, right = (self._stack(side, part) for side in sides)
            torch.bmm(left.mT, right, out=out)
            return
        for group, target in zip(self.rows[slice(*part)], out, strict=True):
            left, right = (side[slice(*group)] for side in sides)
            torch.mm(left.t(), right, out=target)

    def _total(self, like: Tensor, width: int, split: bool) -> Tensor:
        """Room for a product; in fp32 where panels' products add up."""
        total = like.new_empty(len(like), width, dtype=self.dtype if split else torch.float32)
        return total if self.spans else total.zero_()

    def _multiply(
        self,
        total: Tensor,
        rows: Tensor,
        weights: Tensor,
        span: tuple[int, int],
        part: tuple[int, int],
        split: bool,
    ) -> None:
        """rows_g @ weights_g to columns `span` of total if `split`; else of these columns of rows,
        added to total, which the first panel's product replaces."""
        if split:
            total = total[:, slice(*span)]
        else:
            rows = rows[:, slice(*span)]
        add = not split and span[0] > 0
        if self.size is not None:
            _product(self._stack(total, part), self._stack(rows, part), weights, add)
            return
        for group, weight in zip(self.rows[slice(*part)], weights, strict=True):
            _product(total[slice(*group)], rows[slice(*group)], weight, add)

    def _rows(self, part: tuple[int, int]) -> slice:
        return slice(self.rows[part[0]][0], self.rows[part[1] - 1][1])

    def _stack(self, rows: Tensor, part: tuple[int, int]) -> Tensor:
        """Rows of groups of one size as [g, T, C]."""
        return rows[self._rows(part)].unflatten(0, (part[1] - part[0], self.size))


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (+)= a @ b, batched or not; 16-bit products are rounded by the GEMM."""
    if out.dtype != a.dtype:
        product = a @ b
        out.add_(product) if add else out.copy_(product)
    elif add:
        out.baddbmm_(a, b) if a.dim() == 3 else out.addmm_(a, b)
    else:
        torch.matmul(a, b, out=out) if a.dim() == 2 else torch.bmm(a, b, out=out)
