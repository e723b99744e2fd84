"""Where the tensors of an output come from, and what becomes of every tensor of the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .folder import vocabulary_size
from .models import Model
from .recipe import ModelName
from .yaml_reader import RecipeError


@dataclass
class Report:
    """What becomes of the inputs' tensors, for `--dry-run` and the model card.

    Attributes:
        merged: names of merged output tensors.
        averaged: names of running statistics, which are averaged.
        copied: {output tensor: why it is only copied}.
        tied: sentences about tied tensors that some models store and others do not.
        left_out: {model: its tensors that are in no output}.
    """

    merged: list[str] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)
    copied: dict[str, str] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in sentences."""
        lines = [f"merged: {len(self.merged)} tensors"]
        if self.averaged:
            lines.append(f"averaged over the experts: {_some(self.averaged)}")
        for reason, count in Counter(self.copied.values()).items():
            names = [name for name, why in self.copied.items() if why == reason]
            lines.append(f"copied ({reason}): {_some(names)}" if count else "")
        lines += self.tied
        for model, names in self.left_out.items():
            lines.append(f"left out of {model}: {_some(names)}")
        return lines


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


class Finder:
    """Finds tensors of models by name, and remembers which were used.

    Args:
        report: where tied tensors are told.
    """

    def __init__(self, report: Report):
        self.report = report
        self.used: dict[ModelName, set[str]] = {}

    def find(self, model: Model, key: str, shape: tuple[int, ...]) -> str | None:
        """Name of a tensor in a model, that of the tensor it is tied to, or None.

        A model that ties its output layer to its embedding stores one of them; the other is the
        only tensor of that shape outside its layers.

        Args:
            model: where to look.
            key: its name in the reference.
            shape: its shape there.
        """
        found = key if key in model.tensors else tied_to(model, shape)
        if found is not None:
            self.used.setdefault(model.name, set()).add(found)
            if found != key:
                line = f"tied: {model.name} has no {key!r}, its {found!r} is taken"
                if line not in self.report.tied:
                    self.report.tied.append(line)
        return found

    def account(self, models: Iterable[Model], reference: Model, sliced: bool) -> None:
        """Report every tensor that was not used, and refuse what must not be dropped silently.

        Args:
            models: all models that tensors were taken from.
            reference: the model whose configuration the output gets.
            sliced: layers were chosen, so layers that were not are left out without a word.

        Raises:
            RecipeError: a model has an output layer of its own where the output's is tied.
        """
        for model in models:
            used = self.used.get(model.name, set())
            extra = [key for key in model.tensors if key not in used]
            if sliced:
                extra = [key for key in extra if model.stacks.locate(key) is None]
            for key in list(extra):
                if key in reference.tensors or not _is_output_layer(model, key):
                    continue
                if model.is_tied is False and reference.is_tied is not False:
                    raise RecipeError(
                        f"{model.where(key)} is an output layer of its own, which "
                        f"{reference.name} does not have: there it is tied to the embedding"
                    )
                self.report.tied.append(f"tied: {key!r} of {model.name} repeats its embedding")
                extra.remove(key)
            if extra:
                self.report.left_out[str(model.name)] = extra


def tied_to(model: Model, shape: tuple[int, ...]) -> str | None:
    """The one tensor of a shape that another, which the model does not store, is tied to."""
    if model.is_tied is False or not _has_tokens(model, shape):
        return None
    same = [
        key
        for key, entry in model.tensors.items()
        if entry.shape == shape and model.stacks.locate(key) is None and "pos" not in key
    ]
    return same[0] if len(same) == 1 else None


def _is_output_layer(model: Model, key: str) -> bool:
    """Whether a tensor outside the layers has the shape of another one: embedding and output."""
    shape = model.tensors[key].shape
    if not _has_tokens(model, shape) or model.stacks.locate(key) is not None:
        return False
    return any(
        other != key and entry.shape == shape and model.stacks.locate(other) is None
        for other, entry in model.tensors.items()
    )


def _has_tokens(model: Model, shape: tuple[int, ...]) -> bool:
    """Whether a matrix can have one row a token, as far as the configuration tells."""
    return len(shape) == 2 and vocabulary_size(model.config) in (None, shape[0])
