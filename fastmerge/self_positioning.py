"""`self_position`: where in the span of the task vectors to go, learned from a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .attachment import attach, detach
from .coefficients import Coefficients, Granularity
from .learning import History, learn
from .objectives import Objective


def self_position(
    model: nn.Module,
    experts: Mapping[str, Any] | Sequence[Any],
    batches: Mapping[str, Iterable[Any]],
    objective: str | Objective,
    *,
    heads: Mapping[str, Callable[[Any], Tensor]] | None = None,
    steps: int = 100,
    lr: float = 1e-2,
    granularity: Granularity = "task",
    attaching: Mapping[str, Any] | None = None,
    **learning: Any,
) -> tuple[Coefficients, History]:
    """Learn a direction in the span of the task vectors and how far to go along it.

    theta = theta_0 + rho d(alpha), where d folds the task vectors in one by one along the arcs
    between them (`fastmerge.parametrizations`, "slerp"): K - 1 angles and a length, K numbers in
    all. They start at the average, and gradient descent on any loss of a few batches moves them.
    The model is left with merged weights; `fastmerge.materialize` makes ordinary ones of them.

    Args:
        model: the base model, changed in place.
        experts: K fine-tuned models, as for `fastmerge.attach`.
        batches: {task: iterable of inputs}, as for `fastmerge.learn`; the same number of rows of
            each task balances the tasks.
        objective: "entropy", "kl", or a callable(output, Batch) -> scalar, which may use labels;
            `objectives.info_nce` for embedding models.
        heads: {task: callable on the model's output}, as for `fastmerge.learn`.
        steps, lr: of Adam. The paper's are not known.
        granularity: what has a position of its own; the paper has one for the whole model.
        attaching, learning: further arguments of `fastmerge.attach` and of `fastmerge.learn`.

    Returns:
        The coefficients and the history.

    Raises:
        ValueError, TypeError, FloatingPointError: as `fastmerge.attach` and `fastmerge.learn`; the
            model is the base model again then.

    Source: Self Positioning (arXiv 2410.15035).
    """
    coefficients = attach(
        model,
        experts,
        **{
            "granularity": granularity,
            "parametrization": "slerp",
            "init": 1 / len(experts),
            "clamp": None,
            **(attaching or {}),
        },
    )
    try:
        history = learn(
            model,
            coefficients,
            batches,
            heads=heads,
            objective=objective,
            steps=steps,
            lr=lr,
            **learning,
        )
    except BaseException:
        detach(model)
        raise
    return coefficients, history
