"""Deltas that all share one relaxed mask, which is made where it is used and never stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..ops._relaxed_mask import logistic_noise, mask_and_slope
from ._format import Deltas, Stored


class Draw:
    """The mask of one tensor as it is now: its logits, and the key of its noise.

    Args:
        logits: fp32 [*], a parameter where it is to be learned.
        temperature: of the relaxation, 0 for a mask of zeros and ones.
        rescale: whether the mask is divided by its mean over the tensor.

    Attributes:
        key: 64 bits, or None for the mask without noise.
    """

    def __init__(self, logits: Tensor, temperature: float, rescale: bool):
        self.logits, self.rescale = logits, rescale
        self.take(None, temperature)

    def take(self, key: int | None, temperature: float) -> None:
        """Become the mask of this key and temperature."""
        self.key, self.temperature = key, temperature
        self._known: tuple[int, Tensor] | None = None

    def mean(self) -> Tensor:
        """Mean of the mask over the tensor, a scalar; computed once for each draw."""
        version = self.logits._version
        if self._known is None or self._known[0] != version:
            logits = self.logits.detach()
            value = ops.concrete_mean(logits, key=self.key, temperature=self.temperature)
            self._known = (version, value)
        value = self._known[1]
        if torch.is_grad_enabled() and self.logits.requires_grad:
            return _KnownMean.apply(self.logits, value, self.key, self.temperature)
        return value

    def rescaled(self, coefficients: Tensor) -> Tensor:
        """The coefficients over the mask's mean; 0 where the mask leaves nothing."""
        if not self.rescale:
            return coefficients
        mean = self.mean()
        return torch.where(mean > 0, coefficients / mean, 0).to(coefficients.dtype)


class _KnownMean(torch.autograd.Function):
    """The mean of a mask as a function of its logits, where its value is known already."""

    @staticmethod
    def forward(ctx, logits, value, key, temperature):
        ctx.save_for_backward(logits)
        ctx.mask = key, temperature, 0
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        slopes = torch.ops.fastmerge.concrete_mean_backward(grad, logits, *ctx.mask)
        return slopes, None, None, None


class Concrete(Deltas):
    """Task vectors times one relaxed mask, (m / mean(m)) tau_k; it stores logits, 4 bytes an entry.

    The mask is that of `ops.concrete_mean`. Gradients reach logits that require them.

    Args:
        deltas: the K deltas, `Experts` or `Dense`.
        draw: the mask of the whole tensor.
        logits: those of these deltas, a view of `draw.logits`; by default all.
        offset: index of their first entry in the whole tensor.
        noisy: False where the logits have their noise in them.

    Source: Concrete subspace learning (arXiv 2312.06173).
    """

    def __init__(
        self,
        deltas: Stored,
        draw: Draw,
        logits: Tensor | None = None,
        offset: int = 0,
        noisy: bool = True,
    ):
        self.deltas, self.draw, self.offset, self.noisy = deltas, draw, offset, noisy
        self._logits = logits

    @property
    def logits(self) -> Tensor:
        """Logits of these deltas."""
        return self.draw.logits if self._logits is None else self._logits

    def __len__(self) -> int:
        return len(self.deltas)

    def nbytes(self) -> int:
        return self.deltas.nbytes() + self.logits.nbytes

    def _mask(self) -> dict:
        key = self.draw.key if self.noisy else None
        return {"key": key, "temperature": self.draw.temperature, "offset": self.offset}

    def _part(self, deltas: Stored, logits: Tensor, skipped: int) -> Concrete:
        return Concrete(deltas, self.draw, logits, self.offset + skipped, self.noisy)

    def rows(self, start: int, stop: int) -> Concrete:
        width = self.logits[:1].numel()
        return self._part(self.deltas.rows(start, stop), self.logits[start:stop], start * width)

    def entry(self, index: int) -> Concrete:
        logits = self.logits[index]
        return self._part(self.deltas.entry(index), logits, index * logits.numel())

    def gather(self, ids: Tensor) -> Concrete:
        """Rows `ids` of the first dimension; their noise becomes a part of the copied logits."""
        rows = self.logits.index_select(0, ids)
        if self.draw.key is not None and self.noisy and rows.numel():
            width = self.logits[0].numel()
            entries = torch.arange(width, device=ids.device) + self.offset
            entries = entries + ids.unsqueeze(-1) * width
            rows = rows + logistic_noise(entries, self.draw.key, rows.dtype).view(rows.shape)
        return Concrete(self.deltas.gather(ids), self.draw, rows, noisy=False)

    def flat(self) -> Concrete:
        return self._part(self.deltas.flat(), self.logits.flatten(1), 0)

    def task_vectors(self, base: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        mask, _ = mask_and_slope(self.logits, **self._mask(), dtype=dtype)
        mask = self.draw.rescaled(mask)
        for tau in self.deltas.task_vectors(base, dtype):
            yield mask * tau

    def weighted_sum(
        self, base: Tensor, coefficients: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """base + sum_k coefficients_k (m / mean(m)) tau_k, coefficients [K]."""
        return ops.concrete_weighted_sum(
            base,
            self.deltas,
            self.logits,
            self.draw.rescaled(coefficients),
            dtype=dtype,
            **self._mask(),
        )

    def merged_linear(
        self,
        x: Tensor,
        base: Tensor,
        coefficients: Tensor,
        bias: Tensor | None = None,
        transpose: bool = False,
    ) -> Tensor:
        """As `ops.merged_linear`; coefficients [K]."""
        if coefficients.dim() != 1:
            raise RuntimeError(
                f"a relaxed mask takes coefficients [{len(self)}] for all rows, "
                f"got {list(coefficients.shape)}"
            )
        return ops.concrete_linear(
            x,
            base,
            self.deltas,
            self.logits,
            self.draw.rescaled(coefficients),
            bias,
            transpose=transpose,
            **self._mask(),
        )

    def coefficient_grad(self, grad_weight: Tensor, base: Tensor | None = None) -> Tensor:
        """<grad_weight, (m / mean(m)) tau_k>, [K]."""
        count = len(self)
        zeros = grad_weight.new_zeros(count, dtype=torch.float32)
        base = torch.zeros_like(grad_weight) if base is None else base
        _, dots = ops.concrete_grad(
            grad_weight, base, self.deltas, self.logits.detach(), zeros, **self._mask()
        )
        return self.draw.rescaled(dots).detach()
