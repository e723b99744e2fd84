"""`important_chunks`: more chunks of coefficients for the tensors that matter more."""

from __future__ import annotations

import torch
from torch import nn

from .attachment import checked_attachment


def important_chunks(model: nn.Module, budget: int, *, exponent: float = 1.0) -> dict[str, int]:
    """How many chunks each tensor gets, from what its task vectors and coefficients weigh.

    With I_l = sum_k |lambda_lk| |tau_lk|_1 for tensor l, it gets floor(budget I_l^exponent / sum_j
    I_j^exponent) chunks, at least one and at most one a row; tensors of fewer than two dimensions
    get one. So the counts may add up to a little less or more than the budget.

    Learn coefficients of granularity "layer" first, then go on with chunks that start from them:

        chunks = fastmerge.important_chunks(model, budget=1000)
        fastmerge.detach(model)
        finer = fastmerge.attach(model, experts, granularity="chunk", chunks=chunks,
                                 init=coefficients)

    Args:
        model: a model after `fastmerge.attach`, with its present coefficients.
        budget: about how many chunks in all.
        exponent: 0 gives all tensors equally many, larger values favour the heavy ones.

    Returns:
        {tensor name: number of chunks}, for `fastmerge.attach(chunks=...)`.

    Raises:
        ValueError: the model was never attached, the budget is not positive or the exponent
            negative.

    Source: Expert Merging++ (arXiv 2509.25712).
    """
    if budget < 1 or exponent < 0:
        raise ValueError(f"budget must be positive, exponent not negative: {budget}, {exponent}")
    record = checked_attachment(model)
    weights = {}
    for name, weight in record.weights.items():
        if weight.base.dim() < 2:
            continue
        importance = 0.0
        for _, _, base, deltas, row in weight.chunks():
            for k, tau in enumerate(deltas.task_vectors(base, torch.float32)):
                importance += float(row[k].detach().abs()) * float(
                    torch.linalg.vector_norm(tau, 1, dtype=torch.float64)
                )
        weights[name] = importance**exponent
    total = sum(weights.values())
    counts = dict.fromkeys(record.weights, 1)
    for name, importance in weights.items():
        rows = max(1, record.weights[name].base.shape[0])
        share = importance / total if total else 0.0
        counts[name] = min(rows, max(1, int(budget * share)))
    return counts
