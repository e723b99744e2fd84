"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._method import Block, Method, Parameter, Stats
from ._parameters import PerExpert, share
from ._sparse import WEIGHT, normalize_parameter
from .weighted import add_task_vectors


class TaskArithmetic(Method):
    """theta = theta_0 + lambda sum_k w_k tau_k, tau_k = theta_k - theta_0.

    Task vectors are subtracted first, in fp32, scaled, added in the order of the experts, and the
    result is rounded once. The paper has no weights and tunes lambda on validation data; 0.3 is
    what later work on eight vision tasks uses throughout. Merge recipes have weights, lambda 1.

    Args:
        scaling: lambda, or K values, one per expert; negative to forget a task.
        weight: w, a number or K numbers.
        normalize: whether to divide by the sum of the weights (by 1 if that is below 1e-8).

    Source: Task Arithmetic (arXiv 2212.04089), section 2.
    """

    name = "task_arithmetic"
    summary = "base + scaling * sum of task vectors"
    formula = "θ₀ + λ Σ wₖτₖ"
    source = "arXiv 2212.04089"
    carries_nonfinite = True
    parameters = (
        Parameter("scaling", 0.3, "factor of the task vectors: a number, or K numbers"),
        WEIGHT,
        normalize_parameter(False),
    )

    def __init__(
        self,
        scaling: float | Sequence[float] = 0.3,
        weight: float | Sequence[float] = 1.0,
        normalize: bool = False,
    ):
        self.scaling, self.weight = PerExpert("scaling", scaling), PerExpert("weight", weight)
        self.normalize = bool(normalize)

    def combine(self, block: Block, stats: Stats) -> Tensor:
        count = len(block.experts)
        weights = self.weight.of(count)
        total = share(weights, 1e-8) if self.normalize else 1.0
        row = [s * w / total for s, w in zip(self.scaling.of(count), weights, strict=True)]
        return add_task_vectors(block, torch.tensor(row, dtype=torch.float64))
