"""A recipe's parameters for one tensor, made into a merging method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..methods import Method, make_method
from .dialect import Knob
from .recipe import Input, Recipe, Slice
from .settings import Scalar, resolve
from .yaml_reader import RecipeError


class MethodMaker:
    """Makes the method of each tensor; equal parameters share one method object."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.made: dict[tuple, Method | None] = {}

    def make(self, tensor: str, t: float, part: Slice, experts: Sequence[Input]) -> Method | None:
        """The method of one output tensor; None if it is only copied.

        Args:
            tensor: its name.
            t: where its layer is.
            part: the slice it belongs to.
            experts: the K inputs that are the method's experts.

        Raises:
            RecipeError: a required parameter has no value for this tensor, or one is out of range.
        """
        values = {
            name: self._value(name, knob, tensor, t, part, experts)
            for name, knob in self.recipe.dialect.knobs.items()
        }
        key = tuple(values.items())
        if key not in self.made:
            self.made[key] = self._method(values, tensor)
        return self.made[key]

    def _value(
        self, name: str, knob: Knob, tensor: str, t: float, part: Slice, experts: Sequence[Input]
    ) -> Scalar | tuple[Scalar, ...] | None:
        shared = (part.parameters, self.recipe.parameters)
        owners = experts if knob.per_expert else [None]
        found = []
        for owner in owners:
            levels = shared if owner is None else (owner.parameters, *shared)
            try:
                found.append(resolve(name, knob, levels, tensor, t))
            except KeyError:
                whose = "" if owner is None else f" of model {str(owner.model)!r}"
                raise RecipeError(
                    f"{self.recipe.method}: parameter {name!r}{whose} has no value for tensor "
                    f"{tensor!r}"
                ) from None
        return tuple(found) if knob.per_expert else found[0]

    def _method(self, values: dict[str, Any], tensor: str) -> Method | None:
        dialect = self.recipe.dialect
        if dialect.method == "passthrough":
            (values["scale"],) = values["scale"]
            if values["scale"] in (None, 1):
                return None
        arguments = {
            dialect.argument(name): list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if dialect.argument(name) is not None
        }
        try:
            return make_method(dialect.method, **arguments)
        except ValueError as error:
            raise RecipeError(f"{self.recipe.method}, tensor {tensor!r}: {error}") from None
