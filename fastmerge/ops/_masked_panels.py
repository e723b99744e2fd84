"""`masked_linear` on the CPU: panels of masked weights in reused scratch, multiplied by the GEMM.

One row of coefficients runs as `merged_linear` does (`_panel.py`). Row coefficients are grouped:
for every panel, base and unified vector come from memory for the first group and from a cache for
the others, and each group's rows meet the panel of their own weight. Where nearly every row has
coefficients of its own, base and the K task vectors take their turn in the GEMM instead, and their
products are scaled row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ._groups import Groups
from ._panel import PanelLinear, add_product, device_panel_bytes, even_step, scratch_panel

# Rows of activations whose product with a weight takes as long as combining that weight.
COMBINE_ROWS = 24


class MaskedKernels:
    """What `PanelLinear` calls, for deltas that are the unified vector and then K masks.

    Args:
        kernels: module with masked_combine.
    """

    def __init__(self, kernels: ModuleType):
        self.kernels = kernels

    def weighted_sum(self, bases, deltas, coefficients, outs, experts) -> None:
        """As the kernel of this name, for one tensor."""
        self._combine(deltas[0], base=bases[0], coefficients=coefficients[0], out=outs[0])

    def coefficient_grad(self, grads, bases, deltas) -> list[Tensor]:
        """As the kernel of this name, for one tensor."""
        return [self._combine(deltas[0], grad=grads[0])]

    def combine_and_dot(self, base, deltas, coefficients, grad, out, experts) -> Tensor:
        """As the kernel of this name."""
        return self._combine(deltas, base=base, coefficients=coefficients, grad=grad, out=out)

    def _combine(self, deltas, coefficients=None, **tensors) -> Tensor | None:
        unified, *masks = deltas
        lam = () if coefficients is None else coefficients
        return self.kernels.masked_combine(
            unified, masks, tuple(unified.shape), coefficients=lam, **tensors
        )


def panel_linear(
    kernels: ModuleType,
    base: Tensor,
    unified: Tensor,
    masks: Tensor,
    coefficients: Tensor,
    transpose: bool,
    dtype: torch.dtype,
) -> PanelLinear:
    """The panel strategy for one row of coefficients [K]; the rest as in `MaskedPanels`."""
    deltas = [unified, *masks.unbind()]
    lam = coefficients.float().contiguous()
    return PanelLinear(MaskedKernels(kernels), base, deltas, lam, False, transpose, dtype)


class MaskedPanels:
    """Products of rows of activations with masked weights.

    Args:
        kernels: module with masked_combine.
        base: [rows, width] contiguous.
        unified: like base.
        masks: uint8 [K, rows, bytes], each task's contiguous.
        dtype: dtype of the GEMMs.
    """

    def __init__(
        self, kernels: ModuleType, base: Tensor, unified: Tensor, masks: Tensor, dtype: torch.dtype
    ):
        self.kernels, self.base, self.unified, self.dtype = kernels, base, unified, dtype
        self.masks = masks.unbind()
        rows, width = base.shape
        self.step = even_step(
            rows, device_panel_bytes(base.device) // max(1, width * dtype.itemsize)
        )
        starts = range(0, rows, self.step)
        self.spans = [(start, min(rows, start + self.step)) for start in starts]

    def grouped(
        self, x: Tensor, groups: Groups, transpose: bool, bias: Tensor | None = None
    ) -> Tensor:
        """x_r W_g^T + bias for the rows r of every group g, [R, rows]; with `transpose`
        x_r W_g + bias, [R, width].

        Args:
            x: [R, width] ([R, rows] with `transpose`).
            groups: of its rows; their coefficients give the weights W_g.
            transpose: whether outputs are columns of the weight.
            bias: of x's dtype.
        """
        x = groups.gather(x)
        weights = list(zip(groups.spans(), groups.coefficients.tolist(), strict=True))
        if not transpose:
            return self._outputs(x, groups.order, weights, bias)
        totals: list[Tensor | None] = [None] * len(weights)
        for start, stop in self.spans:
            for g, ((first, last), lam) in enumerate(weights):
                panel = self._panel(start, stop, self.base, lam)
                totals[g] = add_product(totals[g], x[first:last, start:stop], panel)
        if not weights or not self.spans:
            y = x.new_zeros(x.shape[0], self.base.shape[1])
        else:
            y = torch.cat(totals)
        y = y if bias is None else y.add_(bias)
        return groups.scatter(y.to(self.dtype))

    def _outputs(self, x: Tensor, order: Tensor | None, weights: list, bias: Tensor | None):
        """`grouped` of gathered rows whose outputs go where `order` says, panel by panel: the
        products of one panel and group are moved while they are in a cache."""
        y = x.new_empty(x.shape[0], self.base.shape[0])
        most = max((last - first for (first, last), _ in weights), default=0)
        for start, stop in self.spans:
            for (first, last), lam in weights:
                panel = self._panel(start, stop, self.base, lam)
                out = y[first:last, start:stop]
                if order is not None:
                    out = scratch_panel("product", most, stop - start, self.dtype)[: last - first]
                if bias is None:
                    torch.mm(x[first:last], panel.t(), out=out)
                else:
                    torch.addmm(bias[start:stop], x[first:last], panel.t(), out=out)
                if order is not None:
                    y[:, start:stop].index_copy_(0, order[first:last], out)
        return y

    def stacked(
        self, x: Tensor, coefficients: Tensor, transpose: bool, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x W0 + sum_k lambda_k x tau_k, each row with its own lambda, and the row dots.

        Args:
            x: as in `grouped`, in any order.
            coefficients: [R, K].
            transpose: as in `grouped`.
            other: rows like the result; their dots with x tau_k are wanted for every k.

        Returns:
            The sum, and fp32 [R, K] or None without `other`.
        """
        total = self._product(x, self.base, [], [], transpose).float()
        dots = []
        for k, mask in enumerate(self.masks):
            scale = coefficients[:, k : k + 1]
            if other is None and not scale.any():
                continue
            product = self._product(x, None, [mask], [1.0], transpose).float()
            total.addcmul_(product, scale)
            if other is not None:
                dots.append((product * other).sum(-1))
        return total.to(self.dtype), torch.stack(dots, -1) if other is not None else None

    def _product(self, x, base, masks, lam, transpose) -> Tensor:
        """x [R, ...] times one weight, panel by panel."""
        size = self.base.shape[1 if transpose else 0]
        total = None if transpose else x.new_empty(x.shape[0], size)
        for start, stop in self.spans:
            panel = self._merge(start, stop, base, masks, lam)
            if transpose:
                total = add_product(total, x[:, start:stop], panel)
            else:
                torch.mm(x, panel.t(), out=total[:, start:stop])
        return x.new_zeros(x.shape[0], size) if total is None else total

    def _panel(self, start: int, stop: int, base: Tensor | None, lam: Sequence[float]) -> Tensor:
        used = [k for k, value in enumerate(lam) if value != 0]
        masks, lam = [self.masks[k] for k in used], [lam[k] for k in used]
        return self._merge(start, stop, base, masks, lam)

    def _merge(self, start, stop, base, masks, lam) -> Tensor:
        """Rows start to stop of base + sum_k lam_k (unified where masks_k), in scratch."""
        out = scratch_panel("weight0", stop - start, self.base.shape[1], self.dtype)
        self.kernels.masked_combine(
            self.unified[start:stop],
            [mask[start:stop] for mask in masks],
            tuple(out.shape),
            base=None if base is None else base[start:stop],
            coefficients=lam,
            out=out,
        )
        return out
