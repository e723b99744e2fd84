"""`search`: merge coefficients by evaluations of a loss alone, such as a score on few examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attachment import Attachment, checked_attachment, remerge_
from .coefficients import Coefficients

BOUNDS = (-1.5, 1.5)  # LoraHub's, where the coefficients have no limits of their own
RISE = math.exp(1 / 3)  # of the step's size after a success; a quarter of it down after a failure


@dataclass
class SearchHistory:
    """What a search found.

    Attributes:
        loss: the best loss, without the regulariser.
        objective: the best loss + l1 mean_g sum_k |lambda_gk|.
        objectives: that of every evaluation, in order; the first is the start's.
    """

    loss: float = math.inf
    objective: float = math.inf
    objectives: list[float] = field(default_factory=list)


def search(
    model: nn.Module,
    coefficients: Coefficients,
    loss: Callable[[], float | Tensor],
    *,
    evaluations: int = 100,
    l1: float = 0.05,
    norm: str = "sum",
    step: float = 0.3,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
) -> SearchHistory:
    """Search merge coefficients by evaluations of a loss alone; the best ones stay in place.

    minimise loss() + l1 mean_g sum_k |lambda_gk| by a (1+1) evolution strategy: all coefficients
    move by step * N(0, 1), the move stays if the objective does not rise, and the step grows after
    a success and shrinks after a failure, in balance at one success of five. The same seed gives
    the same coefficients. Adapters, full weights and any granularity go alike; up to some dozens of
    coefficients are found well, more need more evaluations.

    Args:
        model: a model with merged weights (`fastmerge.attach`), or after `materialize`, whose
            weights are then rewritten for every evaluation: faster where the loss reads much data.
        coefficients: what `attach` returned; the search starts from their values.
        loss: called without arguments and without gradients: what the model loses now, for example
            its cross entropy on a few labelled examples. NaN or Inf counts as worse than anything.
        evaluations: calls of `loss`, the first for the start.
        l1: weight of the regulariser, 0 for none.
        norm: "sum" over the experts, as in the paper, or "mean", as in its code.
        step: standard deviation of the first move.
        bounds: limits of the trained values; by default the coefficients' clamp, or -1.5 and 1.5
            where they have none, or nothing with a parametrization.
        seed: of the moves.

    Returns:
        The history.

    Raises:
        ValueError: an argument does not fit, or the coefficients are not this model's.
        FloatingPointError: the loss at the start is NaN or Inf.

    Source: LoraHub (arXiv 2307.13269): 5 examples a task, l1 0.05, bounds 1.5, start 0, 40
    evaluations, with nevergrad's NGOpt. The strategy and its 1/5 rule: Rechenberg (1973).
    """
    if evaluations < 1 or l1 < 0 or step <= 0:
        raise ValueError(
            f"expected evaluations >= 1, l1 >= 0 and step > 0, got {evaluations}, {l1} and {step}"
        )
    if norm not in ("sum", "mean"):
        raise ValueError(f"norm must be 'sum' or 'mean', got {norm!r}")
    limits = _limits(coefficients, bounds)
    record = checked_attachment(model)
    if record.coefficients is not coefficients:
        raise ValueError("the coefficients are not those that attach returned for this model")
    share = l1 / (len(coefficients.experts) if norm == "mean" else 1)
    first_of_group = [coefficients.rows.index(g) for g in range(len(coefficients.groups))]
    history = SearchHistory()

    def evaluate(values: Tensor) -> tuple[float, float]:
        _set(model, record, coefficients, values)
        found = float(loss())
        total = found
        if share:
            lam = coefficients.matrix()[first_of_group]
            total += share * float(lam.abs().sum(1).mean())
        total = total if math.isfinite(total) else math.inf
        history.objectives.append(total)
        return found, total

    generator = torch.Generator().manual_seed(seed)
    best = coefficients.raw.detach().clone()
    with torch.no_grad():
        try:
            history.loss, history.objective = evaluate(best)
            if not math.isfinite(history.objective):
                raise FloatingPointError(f"the loss at the start is {history.loss}")
            for _ in range(evaluations - 1):
                move = step * torch.randn(best.shape, generator=generator)
                values = (best + move.to(best)).clamp(*limits)
                found, total = evaluate(values)
                if total <= history.objective:
                    best, history.loss, history.objective = values, found, total
                    step *= RISE
                else:
                    step *= RISE**-0.25
        finally:
            _set(model, record, coefficients, best)
    return history


def _limits(coefficients: Coefficients, bounds: tuple[float, float] | None) -> tuple[float, float]:
    if bounds is not None:
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
        return bounds
    if coefficients.parametrization != "identity":
        return -math.inf, math.inf
    return coefficients.clamp or BOUNDS


def _set(model: nn.Module, record: Attachment, coefficients: Coefficients, values: Tensor) -> None:
    coefficients.raw.data.copy_(values)
    if record.materialized:
        remerge_(model, coefficients)
