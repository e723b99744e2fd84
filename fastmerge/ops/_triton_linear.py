"""The strategies of `merged_linear` that are Triton kernels: fused, and stacked on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor


class FusedLinear:
    """One merged linear layer, merged tile by tile in registers.

    Args:
        kernels: module with the launchers.
        base: [O, I]; [I, O] with `transpose`.
        deltas: K tensors like base.
        coefficients: fp32 [K].
        experts: whether deltas are experts.
        transpose: False: y = x W^T. True: y = x W.
    """

    def __init__(
        self,
        kernels: ModuleType,
        base: Tensor,
        deltas: Sequence[Tensor],
        coefficients: Tensor,
        experts: bool,
        transpose: bool,
    ):
        self.kernels, self.base, self.deltas = kernels, base, deltas
        self.coefficients, self.experts, self.transpose = coefficients, experts, transpose

    def scratch_bytes(self) -> int:
        """None of the weight is ever in memory."""
        return 0

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [R, O] of x [R, I]."""
        return self.kernels.merged_linear_forward(x, *self._weights(), bias, *self._layout())

    def backward(
        self, dy: Tensor, x: Tensor, need_x: bool, need_coefficients: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dX [R, I] and dlambda [K], each None if not needed."""
        dx = dlam = None
        if need_x:
            dx = self.kernels.merged_linear_backward_x(dy, *self._weights(), *self._layout())
        if need_coefficients:
            origin = self.base if self.experts else None
            launch = self.kernels.linear_coefficient_grad
            dlam = launch(dy, x, origin, self.deltas, self.transpose, allow_tf32())
        return dx, dlam

    def _weights(self) -> tuple:
        return self.base, self.deltas, self.coefficients

    def _layout(self) -> tuple:
        return self.experts, self.transpose, allow_tf32()


class TritonStackedLinear(FusedLinear):
    """As `FusedLinear`, with coefficients fp32 [R, K]; dlambda [R, K]."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.kernels.row_linear_forward(x, *self._weights(), bias, *self._layout())

    def backward(
        self, dy: Tensor, x: Tensor, need_x: bool, need_coefficients: bool
    ) -> tuple[Tensor, Tensor]:
        return self.kernels.row_linear_backward(dy, x, *self._weights(), *self._layout())


def allow_tf32() -> bool:
    """torch's own switch decides whether fp32 products may run in tf32."""
    return torch.backends.cuda.matmul.allow_tf32
