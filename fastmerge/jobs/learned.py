"""Learned coefficients as the merging method of a job."""

from __future__ import annotations

from collections.abc import Sequence

from ..coefficients import Coefficients
from ..methods import Weighted
from .models import Model
from .yaml_reader import RecipeError


def weighted_method(
    coefficients: Coefficients, experts: Sequence[str], reference: Model, source: str
) -> Weighted:
    """base + sum of task vectors with the coefficients of each tensor.

    Columns are matched with the experts by name where the names are the same, else by position.

    Args:
        coefficients: what was learned.
        experts: names of the K experts.
        reference: the model whose tensors they belong to.
        source: where they come from, for messages.

    Raises:
        RecipeError: they belong to another model or to another number of experts.
    """
    matrix, theirs = coefficients.matrix(), coefficients.experts
    if len(theirs) != len(experts):
        raise RecipeError(
            f"{source}: coefficients are for {len(theirs)} experts ({', '.join(theirs)}), "
            f"the recipe has {len(experts)}"
        )
    if sorted(theirs) == sorted(experts):
        matrix = matrix[:, [theirs.index(name) for name in experts]]
    shapes = coefficients.shapes or [None] * len(coefficients.names)
    for name, shape in zip(coefficients.names, shapes, strict=True):
        entry = reference.tensors.get(name)
        if entry is None:
            raise RecipeError(
                f"{source}: coefficients of another model: {reference.name} has no tensor {name!r}"
            )
        if shape is not None and list(entry.shape) != list(shape):
            raise RecipeError(
                f"{source}: coefficients of another model: tensor {name!r} has shape "
                f"{list(shape)} there, {reference.name} has {list(entry.shape)}"
            )
    parts = matrix.split(coefficients.chunks)
    rows = {
        name: part if len(part) > 1 else part[0]
        for name, part in zip(coefficients.names, parts, strict=True)
    }
    return Weighted(rows, {name: (reference.tensors[name].shape or (1,))[0] for name in rows})
