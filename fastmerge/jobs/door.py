"""`merge_folders`: `fastmerge.merge` for checkpoint folders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..coefficients import Coefficients
from ..methods import Method
from .dialect import DIALECTS, Dialect
from .places import find_folders
from .planning import Choice, make_plan
from .recipe import Input, Recipe, Slice, read_model_name
from .yaml_reader import RecipeError


def merge_folders(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    out: str | Path,
    method: Method | None,
    coefficients: Coefficients | Tensor | None,
    *,
    names: Sequence[str] | None,
    select: Callable[[Sequence[str]], Collection[str]],
    seed: int,
    settings: Mapping[str, Any],
    **options: Any,
) -> Path:
    """Merge checkpoint folders into a new one, as `fastmerge.merge` merges models in memory.

    Args:
        base: folder of the base model.
        experts: K folders, adapters or `folder+adapter`; or {name: folder}.
        out: folder to be made.
        method: the merging method, None with coefficients.
        coefficients: `Coefficients`; or a tensor, [K], or [L, K] with `names`.
        names: the L tensors that rows of coefficients belong to.
        select: (names of floating-point tensors) -> those to merge; others are copied.
        seed: seed of random methods.
        settings: the method's parameters as they were given, for the model card.
        options: for `fastmerge.jobs.engine.run`.

    Raises:
        ValueError: see `make_plan` and `run`.
        TypeError: experts are no folders.
    """
    from .engine import run

    folders = list(experts.values()) if isinstance(experts, Mapping) else list(experts)
    for folder in folders:
        if not isinstance(folder, (str, Path)):
            raise TypeError(f"experts: expected folders as base is, got {type(folder).__name__}")
    labels = list(experts) if isinstance(experts, Mapping) else None
    if coefficients is not None:
        coefficients = _as_coefficients(coefficients, names, len(folders))
    kind = "weighted" if method is None else method.name
    known = DIALECTS.get(kind)
    ignores = known is not None and not known.has_experts
    recipe = Recipe(
        name=None,
        method=kind,
        dialect=Dialect(kind, "required", (1, None)),
        base=read_model_name(str(base), "base"),
        slices=(Slice(tuple(_input(folder) for folder in folders), None),),
        parameters={},
        dtype=None,
        tokenizer=None,
        chat_template=None,
        coefficients=None,
        seed=seed,
        text=_describe(kind, settings, base, folders),
    )
    choice = Choice(method, coefficients, names, labels, select, reads_base=not ignores)
    plan, _ = make_plan(recipe, find_folders(recipe), choice=choice)
    run(plan, out, **options)
    return Path(out)


def _input(folder: str | Path) -> Input:
    return Input(read_model_name(str(folder), "experts"), None)


def _as_coefficients(
    coefficients: Coefficients | Tensor, names: Sequence[str] | None, experts: int
) -> Coefficients | Tensor:
    if isinstance(coefficients, Coefficients):
        return coefficients
    if not isinstance(coefficients, Tensor):
        raise TypeError(
            "coefficients: expected a tensor, Coefficients or a file's path, "
            f"got {type(coefficients).__name__}"
        )
    expected = [experts] if names is None else [len(names), experts]
    if list(coefficients.shape) != expected:
        hint = "; rows for tensors of checkpoint folders need names" if names is None else ""
        raise RecipeError(
            f"coefficients have shape {list(coefficients.shape)}, expected {expected}{hint}"
        )
    if not bool(torch.isfinite(coefficients).all()):
        raise RecipeError("coefficients must be finite floating-point numbers")
    return coefficients


def _describe(
    kind: str, settings: Mapping[str, Any], base: str | Path, folders: Sequence[str | Path]
) -> str:
    """What takes the recipe's place in the model card."""
    lines = [
        f"merge_method: {kind}",
        f"base_model: {Path(base).name}",
        "models:",
        *(f"- {Path(folder).name}" for folder in folders),
        *(f"# {name} = {value!r}" for name, value in settings.items()),
    ]
    return "\n".join(lines)
