"""The stacked strategy of `merged_linear` on a CPU: few rows of activations share coefficients.

y_r = W_0 x_r + sum_k lambda_rk (tau_k x_r): nothing is merged, base and task vectors take their
turn in the product, panel by panel, so that task vectors of experts exist in panels only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import as_task_vector

PANEL_BYTES = 3 << 20  # of task vectors, and of their products
MOST_ROWS = 4096  # rows of activations at a time
LEAST_ENTRIES = 64


class StackedLinear:
    """One merged linear layer with coefficients for every row of activations.

    Args:
        base: [rows, width].
        deltas: K tensors like base.
        coefficients: fp32 [R, K].
        experts: whether deltas are experts.
        transpose: False: y = x W^T. True: y = x W.
        dtype: dtype of the GEMMs.
    """

    def __init__(
        self,
        base: Tensor,
        deltas: Sequence[Tensor],
        coefficients: Tensor,
        experts: bool,
        transpose: bool,
        dtype: torch.dtype,
    ):
        self.weights = [t.t() if transpose else t for t in (base, *deltas)]  # [O, I]
        self.coefficients, self.experts, self.dtype = coefficients, experts, dtype

    def scratch_bytes(self) -> int:
        """Bytes of task vectors that a pass holds at most."""
        outer, inner = self.weights[0].shape
        return max(self._step(a, b) * b for a, b in ((outer, inner), (inner, outer))) * 4

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [R, O] of x [R, I]."""
        return self._walk(x, self.weights, None, bias)[0]

    def backward(
        self, dy: Tensor, x: Tensor, need_x: bool, need_coefficients: bool
    ) -> tuple[Tensor, Tensor]:
        """dX [R, I] and dlambda fp32 [R, K]: the forward pass's walk with the weights' sides
        exchanged, whose products also give dlambda_rk = x_r . (tau_k^T dy_r)."""
        return self._walk(dy, [w.t() for w in self.weights], x, None)

    def _step(self, outer: int, inner: int) -> int:
        rows = min(MOST_ROWS, len(self.coefficients))
        room = PANEL_BYTES // (4 * max(1, rows, inner))
        return max(1, min(outer, max(LEAST_ENTRIES, room)))

    def _walk(
        self, x: Tensor, weights: Sequence[Tensor], other: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y_r = (base + sum_k lambda_rk tau_k) x_r + bias, and other_r . (tau_k x_r) if asked for.

        Args:
            x: [R, I].
            weights: base and deltas [O, I].
            other: [R, O], or None.
            bias: [O], or None.
        """
        base, *deltas = weights
        y = x.new_empty(len(x), len(base))
        dots = x.new_zeros(len(x), len(deltas), dtype=torch.float32)
        used = (self.coefficients != 0).any(0).tolist()
        step = self._step(*base.shape)
        for first in range(0, len(x), MOST_ROWS):
            rows = slice(first, first + MOST_ROWS)
            for start in range(0, len(base), step):
                panel = slice(start, start + step)
                origin = base[panel]
                total = _product(x[rows], origin.to(self.dtype), bias, panel)
                for k, delta in enumerate(deltas):
                    if other is None and not used[k]:
                        continue
                    tau = as_task_vector(origin, delta[panel], self.experts, torch.float32)
                    product = (x[rows] @ tau.to(self.dtype).t()).float()
                    total.addcmul_(self.coefficients[rows, k : k + 1], product)
                    if other is not None:
                        dots[rows, k] += product.mul_(other[rows, panel]).sum(-1)
                y[rows, panel] = total
        return y, dots


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, panel: slice) -> Tensor:
    """x weight^T + bias in fp32; 16-bit products are rounded by the GEMM."""
    if bias is not None and x.dtype == torch.float32:
        return torch.addmm(bias[panel], x, weight.t())
    total = (x @ weight.t()).float()
    return total if bias is None else total.add_(bias[panel])
