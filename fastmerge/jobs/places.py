"""Where a recipe's models are: local folders, looked for without importing torch."""

from __future__ import annotations

from pathlib import Path

from .recipe import ModelName, Recipe
from .yaml_reader import RecipeError

ADAPTER_FILE = "adapter_config.json"


def find_folders(recipe: Recipe, beside: Path | None = None) -> dict[str, Path]:
    """{folder as the recipe names it: where it is} of models and adapters.

    A relative path is taken from the current folder, else from that of the recipe.

    Args:
        recipe: the recipe.
        beside: the folder that the recipe's file is in.

    Raises:
        RecipeError: a folder that is not there.
    """
    names = [part for model in recipe.models() for part in _parts(model)]
    return {name: find_place(name, beside) for name in dict.fromkeys(names)}


def find_place(name: str, beside: Path | None = None) -> Path:
    """A folder or file of a recipe.

    Raises:
        RecipeError: it is not there.
    """
    try:
        path = Path(name).expanduser()
        places = [path] if path.is_absolute() or beside is None else [path, beside / path]
        for place in places:
            if place.exists():
                return place
    except (OSError, ValueError, RuntimeError) as error:  # the last of a user without a home
        raise RecipeError(f"{name[:200]!r}: no usable path: {error}") from None
    raise RecipeError(f"{name[:200]}: no such folder; models are local folders, download it first")


def _parts(model: ModelName) -> list[str]:
    return [model.folder] if model.adapter is None else [model.folder, model.adapter]
