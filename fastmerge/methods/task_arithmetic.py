"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._method import Block, Method, Parameter, Stats
from .weighted import add_task_vectors


class TaskArithmetic(Method):
    """theta = theta_0 + lambda sum_k tau_k, tau_k = theta_k - theta_0.

    Task vectors are subtracted first, in fp32, scaled, added in the order of the experts, and the
    result is rounded once. The paper tunes lambda on validation data; 0.3 is what later work on
    eight vision tasks uses throughout.

    Args:
        scaling: lambda, or K values, one per expert; negative to forget a task.

    Source: Task Arithmetic (arXiv 2212.04089), section 2.
    """

    name = "task_arithmetic"
    summary = "base + scaling * sum of task vectors"
    source = "arXiv 2212.04089"
    parameters = (Parameter("scaling", 0.3, "factor of the task vectors: a number, or K numbers"),)

    def __init__(self, scaling: float | Sequence[float] = 0.3):
        self.scaling = torch.as_tensor(scaling, dtype=torch.float64)
        if self.scaling.dim() > 1 or not torch.isfinite(self.scaling).all():
            raise ValueError(f"scaling must be a finite number or one per expert, got {scaling}")

    def check(self, names: Sequence[str], experts: Sequence[str]) -> None:
        if self.scaling.dim() == 1 and len(self.scaling) != len(experts):
            raise ValueError(f"scaling has {len(self.scaling)} values for {len(experts)} experts")

    def combine(self, block: Block, stats: Stats) -> Tensor:
        return add_task_vectors(block, self.scaling.expand(len(block.experts)))
