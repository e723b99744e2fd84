"""EMR-Merging: elect one task vector for all tasks, mask and rescale it for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checking import Patterns
from ..deltas import Experts, Masked
from ..ops import elect
from ..ops.elect import CANCELLED
from .masked_model import MaskedModel, read_inputs

RESCALE = ("global", "tensor_mean", "none")


class Emr(MaskedModel):
    """theta_t = theta_0 + lambda_t M_t * tau, tau the elected task vector: see `build`."""

    method = "emr"

    @classmethod
    def build(
        cls,
        model: nn.Module,
        experts: Any,
        *,
        rescale: str = "global",
        cancelled: str = "negative",
        exclude: Patterns = None,
        allow_nonfinite: bool = False,
    ) -> Emr:
        """Elect, mask and rescale, tensor by tensor.

        gamma = sign of sum_t tau_t;  tau = gamma max_t |tau_t| over the tau_t of sign gamma;
        M_t = tau_t has the sign gamma;  lambda_t = sum |tau_t| / sum |M_t tau|. No data, no
        training, no hyperparameters. The paper calls lambda the least-squares scale, which it is
        not: it makes the L1 norms equal.

        Beyond inputs and what is kept, memory holds temporaries of one tensor.

        Args:
            model, experts: as for `fastmerge.build`.
            rescale: "global" sums over all entries (the paper); "tensor_mean" adds up the means of
                each tensor, so that small tensors weigh as much as large ones (the published code
                of all but one experiment); "none" is lambda = 1.
            cancelled: what entries with sum_t tau_t = 0 become: "negative" elects the sign - (the
                published code), "zero" leaves them out (the paper's sgn).
            exclude: parameters that stay the base's, for example heads.
            allow_nonfinite: accept NaN or Inf in base or experts.

        Raises:
            ValueError: an option is unknown, or experts do not match the base.

        Source: EMR-Merging (arXiv 2405.17461).
        """
        if rescale not in RESCALE:
            raise ValueError(f"rescale must be one of {', '.join(RESCALE)}, got {rescale!r}")
        if cancelled not in CANCELLED:
            known = " or ".join(repr(name) for name in CANCELLED)
            raise ValueError(f"cancelled must be {known}, got {cancelled!r}")
        inputs = read_inputs(model, experts, exclude, allow_nonfinite)
        sums = torch.zeros(2, len(inputs.tasks), dtype=torch.float64)
        deltas = {}
        for name, base in inputs.base.items():
            stored = Experts([t.contiguous() for t in inputs.experts[name]])
            found = elect(stored, base=base.contiguous(), cancelled=cancelled)
            deltas[name] = Masked(found.unified, found.masks)
            share = max(1, base.numel()) if rescale == "tensor_mean" else 1
            sums += found.magnitudes.cpu() / share
        scales = torch.ones(len(inputs.tasks)) if rescale == "none" else _ratio(sums)
        device = next(iter(inputs.base.values())).device
        return cls(model, deltas, inputs.tasks, scales.to(device), inputs.statistics)


def _ratio(sums: Tensor) -> Tensor:
    """sum |tau_t| / sum |M_t tau|, 1 where nothing is masked in: such a task is the base model."""
    whole, masked = sums
    return torch.where(masked > 0, whole / masked.where(masked > 0, 1), 1).float()
