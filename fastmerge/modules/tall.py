"""TALL masks: for each task, the entries of the merged task vector that are its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checking import Patterns
from ..deltas import Masked
from ..merging import merge
from ..methods.consensus import tall_mask
from ..ops._bits import pack_rows
from ..ops._library import accumulate_dtype
from .dynamic import task
from .masked_model import Inputs, MaskedModel, read_inputs

CANDIDATES = (0.2, 0.3, 0.4, 0.5, 0.6)  # the paper's
DEFAULT = 0.4  # in their middle

Score = Callable[[nn.Module, str], float]


class Tall(MaskedModel):
    """theta_t = theta_0 + M_t * tau, tau the merged task vector: see `build`.

    Attributes:
        thresholds: the K lambda_t of the masks.
    """

    method = "tall"
    thresholds: list[float]

    @classmethod
    def build(
        cls,
        model: nn.Module,
        experts: Any,
        *,
        threshold: float | Sequence[float] | None = None,
        score: Score | None = None,
        candidates: Sequence[float] = CANDIDATES,
        merged: Mapping[str, Any] | None = None,
        exclude: Patterns = None,
        allow_nonfinite: bool = False,
    ) -> Tall:
        """Mask the merged task vector for each task.

        tau = theta_merged - theta_0;  M_t = |tau_t| > lambda_t |tau - tau_t|.

        Args:
            model, experts: as for `fastmerge.build`.
            threshold: lambda, a number or K numbers; by default what `score` chooses, or 0.4.
            score: callable(model, task) -> how good the masked model is on a task's validation
                data; the candidate with the highest is taken, the first of equal ones.
            candidates: what lambda is chosen from.
            merged: how the merged model is made: arguments of `fastmerge.merge`, by default
                dict(method="task_arithmetic", scaling=1.0), the sum of the task vectors.
            exclude: parameters that stay the base's.
            allow_nonfinite: accept NaN or Inf in base or experts.

        Raises:
            ValueError: both threshold and score, a threshold that is negative or one too many, or
                experts do not match the base.

        Source: TALL masks (arXiv 2405.07813), section 4.
        """
        if threshold is not None and score is not None:
            raise ValueError("tall takes threshold or score, got both")
        if not candidates:
            raise ValueError("candidates is empty, expected thresholds to choose from")
        inputs = read_inputs(model, experts, exclude, allow_nonfinite)
        count = len(inputs.tasks)
        several = isinstance(threshold, Sequence)
        given = (
            list(threshold) if several else [DEFAULT if threshold is None else threshold] * count
        )
        if len(given) != count:
            raise ValueError(f"threshold has {len(given)} values for {count} experts")
        for value in (*given, *candidates):
            if not 0 <= value < float("inf"):
                raise ValueError(f"threshold must be a number of at least 0, got {value!r}")
        unified = _merged_task_vector(inputs, merged)

        def masked(thresholds: Sequence[float]) -> Tall:
            deltas = {
                name: Masked(unified[name], _masks(inputs, name, unified[name], thresholds))
                for name in unified
            }
            scales = torch.ones(count, device=next(iter(unified.values())).device)
            made = cls(model, deltas, inputs.tasks, scales, inputs.statistics)
            made.thresholds = [float(value) for value in thresholds]
            return made.train(model.training)

        if score is None:
            return masked(given)
        best: list[tuple[float, float]] = []
        for candidate in candidates:
            tried = masked([candidate] * count)
            for k, name in enumerate(inputs.tasks):
                with task(tried, name):
                    found = float(score(tried, name))
                if k == len(best):
                    best.append((found, candidate))
                elif found > best[k][0]:
                    best[k] = (found, candidate)
        return masked([candidate for _, candidate in best])

    def config(self) -> dict[str, Any]:
        return super().config() | {"thresholds": self.thresholds}

    @classmethod
    def restore(cls, model: nn.Module, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tall:
        restored = super().restore(model, tensors, config)
        restored.thresholds = config["thresholds"]
        return restored


def _merged_task_vector(inputs: Inputs, merged: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """theta_merged - theta_0 by tensor, in the experts' dtype."""
    how = {"method": "task_arithmetic", "scaling": 1.0} if merged is None else dict(merged)
    experts = [{n: inputs.experts[n][k] for n in inputs.base} for k in range(len(inputs.tasks))]
    values = merge(inputs.base, experts, allow_nonfinite=True, **how)
    for name, base in inputs.base.items():
        dtype = accumulate_dtype(base, values[name])
        found = values[name].to(dtype) - base.to(dtype)
        values[name] = found.to(inputs.experts[name][0].dtype).contiguous()
    return values


def _masks(inputs: Inputs, name: str, unified: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Packed masks of one tensor, uint8 [K, rows, bytes]."""
    base = inputs.base[name]
    dtype = accumulate_dtype(base, unified)
    packed = []
    for expert, threshold in zip(inputs.experts[name], thresholds, strict=True):
        tau = expert.to(dtype) - base.to(dtype)
        packed.append(pack_rows(tall_mask(tau, unified.to(dtype), threshold).unsqueeze(0)))
    return torch.cat(packed)
