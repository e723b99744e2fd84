"""Tokenizers of fast tokenizer files: which id every token has, and the union of several."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .folder import read_json
from .yaml_reader import RecipeError

FILE = "tokenizer.json"
MAX_ID = 1 << 24
ZERO = -2  # in place of a row's number: a row of zeros
_DICTIONARIES = ("BPE", "WordPiece", "WordLevel")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer file.

    Attributes:
        name: its model's name, for messages.
        ids: {token: id}, added tokens included.
        raw: the parsed file.
    """

    name: str
    ids: Mapping[str, int]
    raw: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """BPE, WordPiece, WordLevel or Unigram."""
        return str(self.raw["model"].get("type"))

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


def read_vocabulary(folder: Path, name: str) -> Vocabulary:
    """Read `tokenizer.json`.

    Raises:
        RecipeError: no such file, or not the form of one. Names it.
    """
    path = folder / FILE
    if not path.is_file():
        raise RecipeError(
            f"{name}: {path} is missing; aligning vocabularies needs fast tokenizer files of all "
            "models"
        )
    raw = read_json(path)
    try:
        vocab = raw["model"]["vocab"]
        if isinstance(vocab, list):
            vocab = {token: number for number, (token, _) in enumerate(vocab)}
        ids = {**vocab, **{entry["content"]: entry["id"] for entry in raw.get("added_tokens", ())}}
        good = all(
            isinstance(t, str) and type(i) is int and 0 <= i < MAX_ID for t, i in ids.items()
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise RecipeError(f"{path}: expected tokens with ids under model.vocab and added_tokens")
    return Vocabulary(name, ids, raw)


def unite(vocabularies: Sequence[Vocabulary]) -> Vocabulary:
    """The first vocabulary with the tokens that only others have behind its own.

    Ordinary tokens come before added ones, in the order of the models and of their ids there.
    They join the tokenizer's vocabulary, not the texts it matches first, so that it splits text as
    before wherever it can; a BPE tokenizer gains their rows but no merge that forms them.

    Raises:
        RecipeError: a Unigram tokenizer, whose ids are positions, cannot take the new tokens.
    """
    first, *others = vocabularies
    raw: dict[str, Any] = copy.deepcopy(dict(first.raw))
    ids = dict(first.ids)
    size = first.size
    added = [_added(vocabulary) for vocabulary in others]
    for vocabulary, special in zip(others, added, strict=True):
        for token, _ in sorted(vocabulary.ids.items(), key=lambda item: item[1]):
            if token not in ids and token not in special:
                _append(raw, first, vocabulary, token, size)
                ids[token] = size
                size += 1
    for special in added:
        for token, entry in sorted(special.items(), key=lambda item: item[1]["id"]):
            if token not in ids:
                raw.setdefault("added_tokens", []).append({**entry, "id": size})
                ids[token] = size
                size += 1
    return Vocabulary("union", ids, raw)


def with_tokens(
    vocabulary: Vocabulary, tokens: Sequence[str], others: Sequence[Vocabulary]
) -> Vocabulary:
    """A vocabulary with more tokens behind its own, matched in texts first.

    Args:
        vocabulary: the vocabulary.
        tokens: the tokens; those that it has already are left out.
        others: where to look how a token is matched.
    """
    raw, ids, size = copy.deepcopy(dict(vocabulary.raw)), dict(vocabulary.ids), vocabulary.size
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    for token in tokens:
        if token not in ids:
            known = (_added(other).get(token) for other in others)
            entry = next(filter(None, known), {**plain, "special": False})
            entry = {**entry, "id": size, "content": token}
            raw["added_tokens"] = [*(raw.get("added_tokens") or ()), entry]
            ids[token] = size
            size += 1
    return Vocabulary(vocabulary.name, ids, raw)


def _added(vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    return {entry["content"]: entry for entry in vocabulary.raw.get("added_tokens") or ()}


def _append(
    raw: dict[str, Any], first: Vocabulary, other: Vocabulary, token: str, number: int
) -> None:
    """Give a tokenizer one more ordinary token."""
    vocab = raw["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab[token] = number
        return
    scores = other.raw["model"]["vocab"]
    if number != len(vocab) or not isinstance(scores, list):
        raise RecipeError(
            f"tokenizer_source union: token {token!r} of {other.name} ({other.kind}) cannot be "
            f"added to the {first.kind} tokenizer of {first.name}"
        )
    vocab.append([token, dict(map(tuple, scores))[token]])


@dataclass(frozen=True)
class Alignment:
    """Which stored rows make the rows of one model's vocabulary tensors.

    Row r is the model's own row `own[r]`; where that is -1 it is the mean of the rows `index[r]`
    of the (model, index) pairs of `others`, of those that are not -1; if all are, the mean
    of all rows that are not so. Where it is `ZERO`, the row is 0.

    Attributes:
        own: [V] int64.
        others: pairs of a model's name and [V] int64.
    """

    own: Tensor
    others: tuple[tuple[str, Tensor], ...]

    @property
    def is_identity(self) -> bool:
        """Whether every row is the model's own row of the same number."""
        return torch.equal(self.own, torch.arange(len(self.own)))


@dataclass(frozen=True)
class ChosenRow:
    """A row that a recipe chooses for a token.

    Attributes:
        row: the token's row in the output.
        model: name of the model that gives it; None for a row of zeros.
        theirs: number of the row there.
        force: also for models that have a row of their own.
    """

    row: int
    model: str | None
    theirs: int
    force: bool


def align(
    target: Vocabulary,
    rows: int,
    models: Mapping[str, Vocabulary],
    sizes: Mapping[str, int],
    base: str,
    chosen: Sequence[ChosenRow] = (),
) -> dict[str, Alignment]:
    """Line every model's vocabulary rows up with those of a target vocabulary.

    A token that a model lacks gets the base model's row, or the mean of all models that have it if
    the base lacks it too. A row that belongs to no token, padding, is each model's row of the same
    number if that belongs to no token there either, and else treated as a token that it lacks.

    Args:
        target: the output's tokens.
        rows: V, the output's rows; at least the target's size.
        models: {name: vocabulary}.
        sizes: {name: rows of the model's vocabulary tensors}.
        base: name of the base model, or of what takes its place.
        chosen: rows that come from elsewhere.
    """
    tokens = list(target.ids)
    places = torch.tensor([target.ids[token] for token in tokens], dtype=torch.int64)
    unused = torch.ones(rows, dtype=torch.bool)
    unused[places] = False
    own = {}
    for name, vocabulary in models.items():
        size = sizes[name]
        found = torch.tensor([vocabulary.ids.get(t, -1) for t in tokens], dtype=torch.int64)
        index = torch.full((rows,), -1, dtype=torch.int64)
        index[places] = torch.where(found < size, found, -1)
        free = torch.zeros(max(rows, size), dtype=torch.bool)
        free[:size] = True
        free[[number for number in vocabulary.ids.values() if number < size]] = False
        padding = unused & free[:rows]
        index[padding] = padding.nonzero().flatten()
        own[name] = index
    lacking = own[base] < 0
    given = {n: i.clone() if n == base else torch.where(lacking, i, -1) for n, i in own.items()}
    for choice in chosen:
        for name, index in own.items():
            given[name][choice.row] = choice.theirs if name == choice.model else -1
            if choice.force or index[choice.row] < 0:
                index[choice.row] = ZERO if choice.model is None else -1
    names = [base, *(n for n, index in given.items() if n != base and bool((index >= 0).any()))]
    others = tuple((name, given[name]) for name in names)
    return {name: Alignment(index, others) for name, index in own.items()}


def same_tokens(a: Vocabulary, b: Vocabulary) -> bool:
    """Whether two tokenizers give every token the same id."""
    return a.ids == b.ids


def dump(vocabulary: Vocabulary) -> bytes:
    """The text of `tokenizer.json`."""
    return json.dumps(vocabulary.raw, ensure_ascii=False, indent=2).encode()
