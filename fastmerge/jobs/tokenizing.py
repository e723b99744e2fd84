"""The output's tokenizer, and every model's vocabulary tensors in its order of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .aligned import AlignedCheckpoint
from .folder import edit_config
from .models import Model
from .recipe import ModelName, Tokenizer, TokenRow
from .sources import tied_to
from .vocabulary import ChosenRow, Vocabulary, align, read_vocabulary, unite, with_tokens
from .yaml_reader import RecipeError


@dataclass(frozen=True)
class Aligned:
    """Models whose vocabularies agree.

    Attributes:
        models: the models; reading their vocabulary tensors gives the output's rows.
        rows: rows of these tensors.
        layout: the model whose tokenizer files the output gets.
        vocabulary: what its `tokenizer.json` becomes, None if it stays as it is.
        moved: {token id of the base model, or of what takes its place: the output's}.
    """

    models: Mapping[ModelName, Model]
    rows: int
    layout: Model
    vocabulary: Vocabulary | None
    moved: Mapping[int, int]


def align_models(
    models: Mapping[ModelName, Model], tokenizer: Tokenizer, base: ModelName
) -> Aligned:
    """Give all models the vocabulary that a recipe asks for.

    The rows that a model has beyond its tokens, as padding, are kept.

    Args:
        models: all models.
        tokenizer: the recipe's choice.
        base: the base model, or the first model where there is none.

    Raises:
        RecipeError: a tokenizer or a vocabulary size that is missing or does not fit.
    """
    vocabularies = {name: read_vocabulary(m.folder, str(name)) for name, m in models.items()}
    keys = {name: _vocabulary_tensors(model) for name, model in models.items()}
    sizes = {name: models[name].tensors[found[0]].shape[0] for name, found in keys.items()}
    layout = tokenizer.source if isinstance(tokenizer.source, ModelName) else base
    if tokenizer.source == "union":
        others = [v for name, v in vocabularies.items() if name != base]
        target = unite([vocabularies[base], *others])
    else:
        target = vocabularies[layout]
    named = [row.token for row in tokenizer.tokens]
    target = with_tokens(target, named, list(vocabularies.values()))
    rows = max(target.size, sizes[layout])
    rows = -(-rows // tokenizer.multiple) * tokenizer.multiple
    chosen = [_chosen(row, target, vocabularies, sizes) for row in tokenizer.tokens]
    alignments = align(target, rows, vocabularies, sizes, base, chosen)
    checkpoints = {name: model.checkpoint for name, model in models.items()}
    aligned = {}
    for name, model in models.items():
        places = {key: _names_of(key, models[name], models) for key in keys[name]}
        if not (sizes[name] == rows and alignments[name].is_identity):
            checkpoint = AlignedCheckpoint(model.checkpoint, places, alignments[name], checkpoints)
            config = edit_config(model.config, vocabulary=rows)
            model = replace(model, checkpoint=checkpoint, config=config)
        aligned[name] = model
    changed = target.ids != vocabularies[layout].ids
    stays = vocabularies[base].ids.items()
    moved = {number: target.ids[token] for token, number in stays if token in target.ids}
    return Aligned(aligned, rows, models[layout], target if changed else None, moved)


def _chosen(
    row: TokenRow,
    target: Vocabulary,
    vocabularies: Mapping[ModelName, Vocabulary],
    sizes: Mapping[ModelName, int],
) -> ChosenRow:
    """A recipe's choice as numbers of rows."""
    place, where = target.ids[row.token], f"tokenizer.tokens.{row.token[:60]}"
    if row.model is None:
        return ChosenRow(place, None, -1, row.force)
    other = row.token if row.other is None else row.other
    found = vocabularies[row.model].ids.get(other, -1) if isinstance(other, str) else other
    if not 0 <= found < sizes[row.model]:
        raise RecipeError(
            f"{where}: {row.model} has no row of {other!r}, expected a token that it has or a "
            f"number below {sizes[row.model]}"
        )
    return ChosenRow(place, row.model, found, row.force)


def _vocabulary_tensors(model: Model) -> list[str]:
    found = model.vocabulary_tensors()
    if not found:
        raise RecipeError(
            f"{model.name}: no tensor has vocab_size rows by its config.json, so its vocabulary "
            "cannot be aligned"
        )
    return found


def _names_of(key: str, model: Model, models: Mapping[ModelName, Model]) -> dict[ModelName, str]:
    """A vocabulary tensor's name in every model that has it or what it is tied to."""
    width = model.tensors[key].shape[1:]
    names = {}
    for name, other in models.items():
        if key in other.tensors:
            found = key
        else:
            rows = {other.tensors[k].shape[0] for k in other.vocabulary_tensors()}
            found = tied_to(other, (rows.pop(), *width))
        if found is None or other.tensors[found].shape[1:] != width:
            raise RecipeError(
                f"{other.name}: no tensor {key!r} of shape [*, {', '.join(map(str, width))}] as in "
                f"{model.name}, so their vocabularies cannot be aligned"
            )
        names[name] = found
    return names
