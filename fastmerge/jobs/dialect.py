"""What recipes may say: the merge methods' names and parameters, known without importing torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .yaml_reader import RecipeError

REQUIRED = object()

Kind = Literal["number", "bool", "whole", "text", "mode"]


@dataclass(frozen=True)
class Knob:
    """One parameter of a recipe's method.

    Attributes:
        kind: what its values are; "mode" is true, false or a word.
        default: value where the recipe gives none; REQUIRED if it must.
        per_expert: every expert has a value of its own.
    """

    kind: Kind = "number"
    default: Any = None
    per_expert: bool = False


@dataclass(frozen=True)
class Dialect:
    """One merge method of the recipe format.

    Attributes:
        method: its name in `fastmerge.methods.METHODS`.
        base: "required", "optional", "input" (a base model is one more input) or "ignored" (it is
            read only if it is listed as a model).
        inputs: least and largest number of inputs besides the base model.
        knobs: its parameters.
        renamed: {parameter: what the method's constructor calls it}, where that differs; None for
            parameters that have no effect.
    """

    method: str
    base: Literal["required", "optional", "input", "ignored"]
    inputs: tuple[int, int | None]
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    renamed: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def has_experts(self) -> bool:
        """Whether the base model is told from the experts."""
        return self.base in ("required", "optional")

    def argument(self, parameter: str) -> str | None:
        """What the method's constructor calls a parameter; None if it has no effect."""
        return self.renamed.get(parameter, parameter)


_WEIGHT = Knob(default=REQUIRED, per_expert=True)
_DENSITY = Knob(default=1.0, per_expert=True)


_LAMBDA = {"lambda": "scaling"}


def _sparse(
    normalize: bool, rescale: bool, method: str, knobs: Mapping[str, Knob] | None = None
) -> Dialect:
    """A method of mergekit's task arithmetic family, with the parameters that they share."""
    shared = {
        "weight": _WEIGHT,
        "density": _DENSITY,
        "normalize": Knob("bool", normalize),
        "rescale": Knob("mode", rescale),
        "lambda": Knob(default=1.0),
    }
    return Dialect(method, "required", (1, None), {**shared, **(knobs or {})}, _LAMBDA)


_GAMMA = {"gamma": Knob(default=0.01, per_expert=True)}
_EPSILON = {"epsilon": Knob(default=0.15, per_expert=True)}
_TASK_ARITHMETIC = _sparse(False, False, "task_arithmetic")
DIALECTS: dict[str, Dialect] = {
    "linear": Dialect(
        "linear", "input", (1, None), {"weight": _WEIGHT, "normalize": Knob("bool", True)}
    ),
    "task_arithmetic": replace(
        _TASK_ARITHMETIC, renamed={**_LAMBDA, "density": None, "rescale": None}
    ),
    "ties": _sparse(True, False, "weighted_ties"),
    "dare_linear": _sparse(False, True, "dare_linear"),
    "dare_ties": _sparse(False, True, "dare_ties"),
    "breadcrumbs": _sparse(False, False, "breadcrumbs", _GAMMA),
    "breadcrumbs_ties": _sparse(False, False, "breadcrumbs_ties", _GAMMA),
    "della": _sparse(True, True, "della", _EPSILON),
    "della_linear": _sparse(False, True, "della_linear", _EPSILON),
    "slerp": Dialect("slerp", "required", (1, 1), {"t": Knob(default=REQUIRED)}),
    "nuslerp": Dialect(
        "nuslerp",
        "optional",
        (2, 2),
        {
            "weight": _WEIGHT,
            "nuslerp_row_wise": Knob("bool", False),
            "nuslerp_flatten": Knob("bool", True),
        },
    ),
    "multislerp": Dialect(
        "multislerp",
        "optional",
        (1, None),
        {"weight": _WEIGHT, "normalize_weights": Knob("bool", True), "eps": Knob(default=1e-8)},
    ),
    "karcher": Dialect(
        "karcher", "input", (1, None), {"max_iter": Knob("whole", 10), "tol": Knob(default=1e-5)}
    ),
    "model_stock": Dialect(
        "model_stock",
        "required",
        (2, None),
        {"filter_wise": Knob("bool", False), "norm_floor": Knob(default=1e-6)},
    ),
    "sce": Dialect(
        "sce",
        "required",
        (1, None),
        {"select_topk": Knob(default=1.0), "floor": Knob(default=1e-6)},
    ),
    "ram": Dialect("ram", "required", (1, None), {"epsilon": Knob(default=1e-5)}),
    "ramplus_tl": Dialect(
        "ramplus_tl",
        "required",
        (1, None),
        {"epsilon": Knob(default=1e-5), "r": Knob(default=0.1), "alpha": Knob(default=0.2)},
    ),
    "nearswap": Dialect("nearswap", "required", (1, 1), {"t": Knob(default=REQUIRED)}),
    "arcee_fusion": Dialect("arcee_fusion", "required", (1, 1)),
    "passthrough": Dialect("passthrough", "ignored", (1, 1), {"scale": Knob(per_expert=True)}),
    "average": Dialect(
        "average",
        "ignored",
        (1, None),
        {"weight": Knob(default=1.0, per_expert=True)},
        {"weight": "weights"},
    ),
    "consensus": Dialect(
        "consensus",
        "required",
        (1, None),
        {
            "k": Knob("whole", 2),
            "threshold": Knob(default=0.4, per_expert=True),
            "scaling": Knob(default=0.3),
        },
    ),
    "metagpt": Dialect(
        "metagpt",
        "required",
        (1, None),
        {
            "vectors": Knob("text", "plain"),
            "density": _DENSITY,
            "scaling": Knob(default=1.0),
        },
    ),
    "lines": Dialect(
        "lines",
        "required",
        (1, None),
        {
            "alpha": Knob(),
            "beta": Knob(default=0.3),
            "vectors": Knob("text", "plain"),
            "density": Knob(default=1.0),
        },
    ),
    "anchor_ramp": Dialect("anchor_ramp", "ignored", (2, None), {"anchor": Knob("whole", 0)}),
    "weighted": Dialect("weighted", "required", (1, None)),
}

OWN: dict[str, Dialect] = {
    "ties": Dialect(
        "ties",
        "required",
        (1, None),
        {
            "scope": Knob("text", "model"),
            "density": Knob(default=0.2),
            "scaling": Knob(default=1.0),
            "merge": Knob("text", "mean"),
        },
    ),
    "task_arithmetic": Dialect(
        "task_arithmetic", "required", (1, None), {"scaling": Knob(default=0.3, per_expert=True)}
    ),
}
_MARKS = {"scope", "merge", "scaling"}


def find_dialect(method: Any, given: Iterable[str]) -> Dialect:
    """The dialect of a recipe's `merge_method`.

    `ties` and `task_arithmetic` exist twice: as mergekit has them, with a weight for each model,
    and as the papers have them, which a recipe chooses by giving `scaling`, `merge` or `scope`.

    Args:
        method: what the recipe says.
        given: names of all parameters that the recipe gives anywhere.

    Raises:
        RecipeError: unknown method, with the nearest name.
    """
    if not isinstance(method, str) or method not in DIALECTS:
        raise RecipeError(f"merge_method: unknown method {method!r}, {nearest(method, DIALECTS)}")
    if method in OWN and _MARKS.intersection(given):
        return OWN[method]
    return DIALECTS[method]


def nearest(word: Any, known: Iterable[str]) -> str:
    """The end of an error message about an unknown word: a near word, or all there are."""
    known = list(known)
    near = difflib.get_close_matches(str(word)[:100].lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
