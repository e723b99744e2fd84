"""`greedy_merge`: experts taken one by one while a score of the user's improves."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .merging import merge
from .sources import named_experts

Model = nn.Module | Mapping[str, Tensor] | Path
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass
class GreedyMerge:
    """What a greedy merge found.

    Attributes:
        model: the best merged model, of the kind of the base; the path of the folder for folders.
        score: its score.
        weights: {expert: its weight}, 0 for those that were not taken; they add up to 1. With
            another method than "linear" 1 for those that were.
        trials: (weights, score) of every model that was scored, in order.
    """

    model: Any = field(repr=False)
    score: float
    weights: dict[str, float]
    trials: list[tuple[dict[str, float], float]] = field(repr=False)


def greedy_merge(
    base: nn.Module | Mapping[str, Tensor] | str | Path,
    experts: Mapping[str, Any] | Sequence[Any],
    score: Callable[[Model], float],
    *,
    method: str = "linear",
    grid: Sequence[float] = GRID,
    out: str | Path | None = None,
    **params: Any,
) -> GreedyMerge:
    """Merge experts one by one, from the best to the worst, and keep those that improve a score.

    Every expert is scored alone; the best is the start. Each of the others is then tried, with
    method "linear" as (1 - w) merged + w expert for every w of the grid, with another method as one
    more of its experts. What scores best is kept if it scores higher than the merge before. Merges
    are made from the experts each time, so that no rounding adds up.

    Args:
        base: module, state dict or checkpoint folder: the base model of the method, and of which
            kind the result is.
        experts: K models, as for `fastmerge.merge`; folders if base is one.
        score: (merged model, of the kind of base, or a folder's path) -> how good it is.
        method: a method of `fastmerge.merge`.
        grid: the candidate's weights w with method "linear", between 0 and 1.
        out: the folder to be made, if base is one; trials are made beside it and removed.
        params: the method's parameters, and further arguments of `fastmerge.merge`.

    Raises:
        ValueError: a score is NaN, the grid is empty or leaves 0 to 1, or models do not fit.
        TypeError: `out` is missing for folders, or given for other models.

    Source: Model-GLUE (arXiv 2410.05357), section 4; without a grid, the greedy soup of Model Soups
    (arXiv 2203.05482).
    """
    named = named_experts(experts)
    folders = isinstance(base, (str, Path))
    if folders != (out is not None):
        raise TypeError("greedy_merge: out is for checkpoint folders, which need it")
    if method == "linear" and (not grid or not all(0 < w < 1 for w in grid)):
        raise ValueError(f"grid must hold weights between 0 and 1, got {list(grid)}")
    trials: list[tuple[dict[str, float], float]] = []

    def made(weights: Mapping[str, float], folder: Path | None = None) -> Any:
        taken = {name: named[name] for name, weight in weights.items() if weight}
        options = dict(params)
        if method == "linear":
            options |= {"weight": [weights[name] for name in taken], "normalize": False}
        if folder is not None:
            options["out"] = folder
        return merge(base, taken, method, **options)

    def tried(weights: Mapping[str, float]) -> float:
        if not folders:
            found = float(score(made(weights)))
        else:
            parent = Path(out).resolve().parent
            with tempfile.TemporaryDirectory(prefix=".greedy-", dir=parent) as place:
                found = float(score(made(weights, Path(place) / "merged")))
        if math.isnan(found):
            raise ValueError(f"greedy_merge: the score of {dict(weights)} is NaN")
        trials.append((dict(weights), found))
        return found

    nothing = dict.fromkeys(named, 0.0)
    alone = {name: tried({**nothing, name: 1.0}) for name in named}
    first, *others = sorted(named, key=lambda name: -alone[name])
    weights, best = {**nothing, first: 1.0}, alone[first]
    for name in others:
        steps = grid if method == "linear" else (None,)
        candidates = [_with(weights, name, step) for step in steps]
        scores = [tried(candidate) for candidate in candidates]
        if max(scores) > best:
            best = max(scores)
            weights = candidates[scores.index(best)]
    return GreedyMerge(made(weights, Path(out) if folders else None), best, weights, trials)


def _with(weights: Mapping[str, float], name: str, step: float | None) -> dict[str, float]:
    """The weights with one more expert: a share `step` of it, or 1 for all that are taken."""
    if step is None:
        return {**weights, name: 1.0}
    return {**{n: (1 - step) * w for n, w in weights.items()}, name: step}
