"""Merge coefficients: how many there are, which tensor uses which, and their limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "fastmerge-coefficients-1"

Granularity = str | Mapping[str, str] | Callable[[str], str]


class Coefficients(nn.Module):
    """How much of each expert every tensor takes: lambda = clamp(raw[group of the tensor]).

    The raw values are the trained parameter; the clamp acts in the forward pass only, so its
    gradient is zero strictly outside the limits and optimizer momentum can still move raw values
    there (AdaMerging, arXiv 2310.02575, as released).

    Args:
        names: names of the L tensors that are merged.
        experts: names of the K experts.
        granularity: "task" (one row for all tensors), "layer" (one row per named tensor, as in
            the paper's code), or custom groups: a function or mapping from tensor name to label.
        init: one value, K values (one per expert), or a tensor [G, K].
        clamp: (low, high) or None.
        shapes: shapes of the L tensors, kept so that a file cannot be applied to another model.

    Attributes:
        raw: parameter [G, K], fp32.
        rows: index of the group of each tensor, L integers.
        groups: labels of the G groups.

    Raises:
        ValueError: K or L is 0, names repeat, or init does not fit.
    """

    def __init__(
        self,
        names: Sequence[str],
        experts: Sequence[str],
        *,
        granularity: Granularity = "layer",
        init: float | Sequence[float] | Tensor = 0.3,
        clamp: tuple[float, float] | None = (0.0, 1.0),
        shapes: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__()
        self.names, self.experts = list(names), list(experts)
        for what, values in (("tensor", self.names), ("expert", self.experts)):
            if not values:
                raise ValueError(f"coefficients need at least one {what}, got none")
            if len(set(values)) != len(values):
                raise ValueError(f"{what} names must be unique, got {values}")
        if shapes is not None and len(shapes) != len(self.names):
            raise ValueError(f"{len(shapes)} shapes for {len(self.names)} tensors")
        if clamp is not None and not clamp[0] < clamp[1]:
            raise ValueError(f"clamp must be (low, high) with low < high, got {clamp}")
        self.shapes = None if shapes is None else [list(s) for s in shapes]
        self.clamp = None if clamp is None else (float(clamp[0]), float(clamp[1]))
        labels = _labels(self.names, granularity)
        self.granularity = granularity if isinstance(granularity, str) else "custom"
        self.groups = list(dict.fromkeys(labels))
        index = {label: g for g, label in enumerate(self.groups)}
        self.rows = [index[label] for label in labels]
        self.raw = nn.Parameter(self._initial(init))

    def _initial(self, init: float | Sequence[float] | Tensor) -> Tensor:
        shape = (len(self.groups), len(self.experts))
        values = torch.as_tensor(init, dtype=torch.float32).detach().clone()
        if values.dim() > 2 or (values.dim() == 2 and values.shape != shape):
            raise ValueError(f"init has shape {list(values.shape)}, expected {list(shape)}")
        if values.dim() == 1 and values.shape[0] != shape[1]:
            raise ValueError(f"init has {values.shape[0]} values for {shape[1]} experts")
        if not torch.isfinite(values).all():
            raise ValueError("init must be finite")
        return values.expand(shape).clone()

    def row(self, index: int) -> Tensor:
        """Coefficients of tensor `index`: [K], differentiable."""
        raw = self.raw[self.rows[index]]
        return raw if self.clamp is None else raw.clamp(*self.clamp)

    def spans(self, index: int, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, row of coefficients) of each chunk of rows of tensor `index`."""
        return ((0, shape[0] if len(shape) else 1, index),)

    def matrix(self) -> Tensor:
        """Coefficients of all tensors: [L, K], detached."""
        raw = self.raw.detach()[self.rows]
        return raw if self.clamp is None else raw.clamp(*self.clamp)

    def extra_repr(self) -> str:
        return (
            f"tensors={len(self.names)}, experts={len(self.experts)}, "
            f"granularity={self.granularity!r}, clamp={self.clamp}"
        )

    def save(self, path: str | Path) -> None:
        """Write raw values, groups and the model's tensor names and shapes as one safetensors."""
        description = {
            "names": self.names,
            "experts": self.experts,
            "granularity": self.granularity,
            "groups": self.groups,
            "clamp": self.clamp,
            "shapes": self.shapes,
        }
        tensors = {
            "raw": self.raw.detach().cpu().contiguous(),
            "rows": torch.tensor(self.rows, dtype=torch.int64),
        }
        metadata = {"format": FORMAT, **{k: json.dumps(v) for k, v in description.items()}}
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)

    def load(self, path: str | Path) -> Coefficients:
        """Take the raw values of a file that was saved for the same tensors and experts.

        Raises:
            ValueError: the file belongs to another model, other experts or other groups.
        """
        other = load_coefficients(path)
        self.check_same(other.names, other.shapes, str(path))
        if other.experts != self.experts:
            raise ValueError(f"{path}: experts are {other.experts}, expected {self.experts}")
        if other.rows != self.rows:
            raise ValueError(
                f"{path}: granularity is {other.granularity!r} with {len(other.groups)} groups, "
                f"expected {self.granularity!r} with {len(self.groups)}"
            )
        if other.clamp != self.clamp:
            raise ValueError(f"{path}: clamp is {other.clamp}, expected {self.clamp}")
        with torch.no_grad():
            self.raw.copy_(other.raw)
        return self

    def check_same(
        self, names: Sequence[str], shapes: Sequence[Sequence[int]] | None, source: str
    ) -> None:
        """Raise ValueError, naming the first difference, unless these are the same tensors."""
        check_same_tensors(self.names, self.shapes, list(names), shapes, source)


def check_same_tensors(
    names: Sequence[str],
    shapes: Sequence[Sequence[int]] | None,
    found_names: Sequence[str],
    found_shapes: Sequence[Sequence[int]] | None,
    source: str,
) -> None:
    """Raise ValueError, naming the first difference between expected and found tensors."""
    missing = [n for n in names if n not in set(found_names)]
    extra = [n for n in found_names if n not in set(names)]
    if missing or extra:
        what = f"has no row for {missing[0]!r}" if missing else f"has a row for {extra[0]!r}"
        raise ValueError(
            f"{source}: coefficients of another model: {what} "
            f"({len(missing)} tensors missing, {len(extra)} unknown)"
        )
    if list(names) != list(found_names):
        i = next(i for i, (a, b) in enumerate(zip(names, found_names, strict=True)) if a != b)
        raise ValueError(f"{source}: row {i} belongs to {found_names[i]!r}, expected {names[i]!r}")
    if shapes is not None and found_shapes is not None:
        for name, expected, found in zip(names, shapes, found_shapes, strict=True):
            if list(expected) != list(found):
                raise ValueError(
                    f"{source}: coefficients of another model: tensor {name!r} has shape "
                    f"{list(found)}, expected {list(expected)}"
                )


def load_coefficients(path: str | Path) -> Coefficients:
    """Read coefficients that `Coefficients.save` wrote.

    Raises:
        ValueError: not such a file, or its parts contradict each other.
        FileNotFoundError: no file there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no coefficient file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: not a coefficient file (format {FORMAT})")
            raw, rows = file.get_tensor("raw"), file.get_tensor("rows").tolist()
        about = {key: json.loads(metadata[key]) for key in _DESCRIPTION}
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path}: not a valid coefficient file: {error}") from error
    names, groups = about["names"], about["groups"]
    if len(rows) != len(names) or any(not 0 <= row < len(groups) for row in rows):
        raise ValueError(f"{path}: rows do not match {len(names)} names and {len(groups)} groups")
    if not torch.isfinite(raw).all():
        raise ValueError(f"{path}: coefficients contain NaN or Inf")
    clamp = about["clamp"]
    loaded = Coefficients(
        names,
        about["experts"],
        granularity={name: groups[row] for name, row in zip(names, rows, strict=True)},
        init=raw[list(dict.fromkeys(rows))],
        clamp=None if clamp is None else tuple(clamp),
        shapes=about["shapes"],
    )
    loaded.granularity = about["granularity"]
    return loaded


_DESCRIPTION = ("names", "experts", "granularity", "groups", "clamp", "shapes")


def _labels(names: Sequence[str], granularity: Granularity) -> list[str]:
    if granularity == "task":
        return ["all"] * len(names)
    if granularity == "layer":
        return list(names)
    if isinstance(granularity, str):
        raise ValueError(
            f"granularity must be 'task', 'layer', or a function or mapping from tensor name to "
            f"group label, got {granularity!r}"
        )
    if isinstance(granularity, Mapping):
        missing = [n for n in names if n not in granularity]
        if missing:
            raise ValueError(f"granularity maps no group to tensor {missing[0]!r}")
        return [str(granularity[n]) for n in names]
    return [str(granularity(n)) for n in names]
