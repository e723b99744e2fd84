"""The texts that go beside an output's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .folder import (
    OTHER_FILES,
    TOKENIZER_FILES,
    chat_template,
    copied_files,
    dump_json,
    edit_config,
    moved_ids,
    read_config,
    read_json,
    special_ids,
)
from .models import Model
from .recipe import Recipe
from .tokenizing import Aligned
from .vocabulary import dump

_GENERATION = "generation_config.json"


def output_files(
    recipe: Recipe,
    reference: Model,
    aligned: Aligned | None,
    layer_sources: Sequence[int] | None,
    folders: Sequence[Path],
) -> dict[str, bytes]:
    """{name: contents} of configuration, tokenizer and chat template.

    Args:
        recipe: the recipe.
        reference: the model whose configuration the output gets.
        aligned: the output's vocabulary, if the recipe chooses it.
        layer_sources: for each layer of the output the layer it is made of, if layers are chosen.
        folders: the inputs' folders, the base model's first.
    """
    layout = reference if aligned is None else aligned.layout
    files = copied_files(layout.folder, TOKENIZER_FILES)
    if aligned is not None and aligned.vocabulary is not None:
        files["tokenizer.json"] = dump(aligned.vocabulary)
        for outdated in ("vocab.json", "vocab.txt", "added_tokens.json", "tokenizer.model"):
            files.pop(outdated, None)
    if recipe.chat_template is not None:
        files = chat_template(files, recipe.chat_template, folders)
    files |= copied_files(reference.folder, OTHER_FILES)
    moves = aligned is not None and layout is not reference
    if moves and _GENERATION in files:
        about = read_json(reference.folder / _GENERATION)
        path = layout.folder / _GENERATION
        theirs = read_json(path) if path.is_file() else read_config(layout.folder)
        ids = moved_ids(about, special_ids(theirs), aligned.moved)
        files[_GENERATION] = dump_json({**about, **ids})
    if not reference.config:
        return files
    layers = None
    if layer_sources is not None:
        layers = (next(iter(reference.stacks.sizes.values())), layer_sources)
    ids = None
    if moves:
        theirs = special_ids(read_config(layout.folder))
        ids = moved_ids(reference.config, theirs, aligned.moved)
    config = edit_config(
        reference.config,
        dtype=recipe.dtype,
        layers=layers,
        vocabulary=None if aligned is None else aligned.rows,
        ids=ids,
    )
    return {"config.json": dump_json(config), **files}
