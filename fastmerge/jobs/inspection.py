"""How experts differ from their base model and from each other, measured a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..deltas import Dense
from ..ops import coefficient_grad
from .models import Model, is_floating
from .yaml_reader import RecipeError

BLOCK_ENTRIES = 1 << 20
LARGE_NORM = 3.0  # times the median of the other experts' norms
NEAR_COSINE = 0.999


@dataclass(frozen=True)
class Measure:
    """Sums over entries; those of disjoint tensors add up.

    Attributes:
        entries: number of entries.
        base: sum of squares of the base model.
        products: [K, K] fp64, inner products of the task vectors.
        both: [K, K], entries where both task vectors are not 0; on the diagonal, changed entries.
        opposed: [K, K], entries where they have opposite signs.
        torn: entries where some task vector is positive and some other negative.
    """

    entries: int
    base: float
    products: Tensor
    both: Tensor
    opposed: Tensor
    torn: int

    def __add__(self, other: Measure) -> Measure:
        return Measure(
            self.entries + other.entries,
            self.base + other.base,
            self.products + other.products,
            self.both + other.both,
            self.opposed + other.opposed,
            self.torn + other.torn,
        )

    def norms(self) -> list[float]:
        """Norms of the K task vectors."""
        return self.products.diagonal().sqrt().tolist()

    def relative_norms(self) -> list[float]:
        """Norms of the task vectors, divided by the base model's."""
        base = math.sqrt(self.base)
        return [norm / base if base else math.nan for norm in self.norms()]

    def cosines(self) -> Tensor:
        """[K, K] cosines of the task vectors; NaN with one that is 0."""
        norms = self.products.diagonal().sqrt()
        return self.products / torch.outer(norms, norms)

    def mean_cosine(self) -> float:
        """Mean over the pairs; NaN for one expert."""
        pairs = torch.triu_indices(len(self.products), len(self.products), 1)
        return float(self.cosines()[pairs[0], pairs[1]].mean())

    def conflict(self) -> float:
        """Share of all entries where signs of task vectors oppose each other."""
        return self.torn / self.entries if self.entries else math.nan

    def conflicts(self) -> Tensor:
        """[K, K] share of opposite signs among the entries that both change."""
        return self.opposed / self.both

    def as_json(self) -> dict[str, Any]:
        """Numbers for a JSON file, null for what is not defined."""
        return {
            "entries": self.entries,
            "base_norm": _number(math.sqrt(self.base)),
            "norms": [_number(norm) for norm in self.norms()],
            "cosines": _numbers(self.cosines()),
            "sign_conflict": _number(self.conflict()),
            "sign_conflicts": _numbers(self.conflicts()),
            "changed": [_number(share) for share in self.changed()],
        }

    def changed(self) -> list[float]:
        """Share of entries that each expert changed."""
        return [float(n) / self.entries if self.entries else math.nan for n in self.both.diagonal()]


@dataclass(frozen=True)
class Inspection:
    """What was measured.

    Attributes:
        experts: names of the K experts.
        tensors: {tensor: its measure}.
        layers: {stack of layers: measures of its layers, in order}.
        total: of all tensors.
        skipped: {tensor: why it was not compared}.
        warnings: sentences about what will make a merge go wrong.
    """

    experts: Sequence[str]
    tensors: Mapping[str, Measure]
    layers: Mapping[str, Sequence[Measure]]
    total: Measure
    skipped: Mapping[str, str]
    warnings: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "experts": list(self.experts),
            "total": self.total.as_json(),
            "layers": {s: [m.as_json() for m in found] for s, found in self.layers.items()},
            "tensors": {name: measure.as_json() for name, measure in self.tensors.items()},
            "skipped": dict(self.skipped),
            "warnings": list(self.warnings),
        }


def inspect_models(base: Model, experts: Sequence[Model]) -> Inspection:
    """Measure the task vectors of experts, tensor by tensor, in memory that a block needs.

    Differences are taken in fp32, products and counts summed in fp64.

    Args:
        base: the base model.
        experts: K experts.

    Raises:
        RecipeError: no tensor can be compared.
    """
    tensors, skipped = {}, {}
    for key, entry in base.tensors.items():
        reason = _why_skipped(key, base, experts)
        if reason is None:
            measure = _measure(key, entry.shape, base, experts)
            if math.isfinite(measure.base) and bool(measure.products.isfinite().all()):
                tensors[key] = measure
            else:
                skipped[key] = "has NaN or Inf entries"
        else:
            skipped[key] = reason
    if not tensors:
        found = "; ".join(f"{name} {reason}" for name, reason in list(skipped.items())[:2])
        raise RecipeError(f"{base.name}: no tensor can be compared with the experts' ({found})")
    names = [str(expert.name) for expert in experts]
    total = _sum(tensors.values())
    layers = {
        stack: [
            _sum(found)
            for layer in range(size)
            if (found := _of_layer(tensors, base, stack, layer))
        ]
        for stack, size in base.stacks.sizes.items()
    }
    warnings = [*_warnings(names, total), *_skip_warnings(skipped)]
    return Inspection(names, tensors, layers, total, skipped, warnings)


def _of_layer(tensors: Mapping[str, Measure], base: Model, stack: str, layer: int) -> list[Measure]:
    prefix = f"{stack}{layer}."
    return [measure for name, measure in tensors.items() if name.startswith(prefix)]


def _sum(measures) -> Measure:
    first, *others = measures
    for other in others:
        first = first + other
    return first


def _why_skipped(key: str, base: Model, experts: Sequence[Model]) -> str | None:
    entry = base.tensors[key]
    if not is_floating(entry.dtype):
        return "holds no floating-point numbers"
    if 0 in entry.shape:
        return "is empty"
    for expert in experts:
        other = expert.tensors.get(key)
        if other is None:
            return f"is missing in {expert.name}"
        if other.shape != entry.shape:
            return f"has shape {list(other.shape)} in {expert.name}, {list(entry.shape)} in base"
    return None


def _measure(key: str, shape: tuple[int, ...], base: Model, experts: Sequence[Model]) -> Measure:
    rows = shape[0] if shape else 1
    step = max(1, BLOCK_ENTRIES // max(math.prod(shape) // max(rows, 1), 1))
    total = None
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        stored = base.checkpoint.read(key, start, stop).float()
        vectors = torch.stack([e.checkpoint.read(key, start, stop).float() for e in experts])
        vectors -= stored
        measure = _measure_block(stored.flatten(), vectors.flatten(1))
        total = measure if total is None else total + measure
        for model in (base, *experts):
            model.checkpoint.release(key, start, stop)
    return total


def _measure_block(base: Tensor, vectors: Tensor) -> Measure:
    """Measure of a block: base [n], task vectors [K, n] in fp32, which it overwrites."""
    parts = list(vectors.unbind())
    products = torch.stack([coefficient_grad(part, Dense(parts)).double() for part in parts])
    signs = vectors.sign_()
    agreement = _counts(signs)
    both = _counts(signs.abs())
    torn = int(((signs.amax(0) > 0) & (signs.amin(0) < 0)).sum())
    square = float(coefficient_grad(base, Dense([base])))
    return Measure(base.numel(), square, products, both, (both - agreement) / 2, torn)


def _counts(signs: Tensor) -> Tensor:
    """[K, K] sums of products of signs, whole numbers that the dtype of the product holds."""
    wide = signs if signs.shape[1] < 1 << 24 else signs.double()
    return (wide @ wide.T).double()


def _warnings(names: Sequence[str], total: Measure) -> Iterator[str]:
    norms = total.norms()
    for k, norm in enumerate(norms):
        others = sorted(norms[:k] + norms[k + 1 :])
        median = others[len(others) // 2] if others else 0.0
        if norm == 0:
            yield f"{names[k]} equals the base model"
        elif median > 0 and norm > LARGE_NORM * median:
            yield (
                f"the task vector of {names[k]} is {norm / median:.1f} times as long as the median "
                "of the others; with equal weights it outweighs them"
            )
    cosines = total.cosines()
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            if cosines[i, j] > NEAR_COSINE:
                yield f"{names[i]} and {names[j]} have nearly the same task vector"


def _skip_warnings(skipped: Mapping[str, str]) -> Iterator[str]:
    reasons = {
        name: why for name, why in skipped.items() if "empty" not in why and "no fl" not in why
    }
    if reasons:
        name, why = next(iter(reasons.items()))
        more = f" ({len(reasons)} such tensors)" if len(reasons) > 1 else ""
        yield f"not compared: tensor {name!r} {why}{more}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(values: Tensor) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in values.tolist()]
