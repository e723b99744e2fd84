"""What is checked before anything is merged: names, shapes, dtypes, devices and finite values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .ops._library import FLOAT_DTYPES
from .sources import read_experts

Patterns = str | Sequence[str] | Callable[[str], bool] | None

STATISTICS = ("running_mean", "running_var")


def running_statistics(model: nn.Module | Mapping[str, Tensor]) -> list[str]:
    """Names of the running means and variances that normalization layers keep as buffers."""
    buffers = model.named_buffers() if isinstance(model, nn.Module) else model.items()
    return [
        name
        for name, tensor in buffers
        if name.rpartition(".")[2] in STATISTICS and tensor.is_floating_point()
    ]


def select_names(
    names: Sequence[str],
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    others: Collection[str] = (),
) -> list[str]:
    """Names to merge: those that `include` matches (all by default) and `exclude` does not.

    Args:
        names: names to choose from; their order is kept.
        include, exclude: glob patterns, or a function of the name.
        others: further names that exist and cannot be chosen, so patterns may match them.

    Raises:
        ValueError: a glob pattern matches no name, or nothing is left.
    """
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in _globs(patterns):
            if not any(fnmatchcase(name, pattern) for name in (*names, *others)):
                raise ValueError(f"{argument}: no tensor name matches {pattern!r}")
    chosen = [name for name in names if is_selected(name, include, exclude)]
    if not chosen:
        raise ValueError(f"no tensor is selected for merging, of {len(names)} candidates")
    return chosen


def is_selected(name: str, include: Patterns, exclude: Patterns) -> bool:
    """Whether `include` (None: everything) matches a name and `exclude` does not."""
    return (include is None or matches(name, include)) and not matches(name, exclude)


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a name satisfies glob patterns or a function; None matches nothing."""
    if callable(patterns):
        return bool(patterns(name))
    return any(fnmatchcase(name, pattern) for pattern in _globs(patterns))


def _globs(patterns: Patterns) -> Sequence[str]:
    if patterns is None or callable(patterns):
        return ()
    return (patterns,) if isinstance(patterns, str) else patterns


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For every name, the first name of the same memory: itself unless tensors are tied."""
    first: dict[tuple, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        tied[name] = name
        if tensor.numel() > 0 and not is_special(tensor):
            view = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            tied[name] = first.setdefault(view, name)
    return tied


def is_special(tensor: Tensor) -> bool:
    """Whether a tensor's values are not plain strided memory: meta, sparse, quantized, wrapped."""
    return (
        tensor.is_meta
        or tensor.layout != torch.strided
        or tensor.is_quantized
        or is_traceable_wrapper_subclass(tensor)
    )


def check_models(
    base: Mapping[str, Tensor],
    experts: Any,
    *,
    known: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
    allow_nonfinite: bool = False,
) -> tuple[list[str], dict[str, list[Tensor]]]:
    """Check that experts fit a base model, and line their tensors up with the base's.

    Non-contiguous tensors are fine, and so is a dtype that differs from the base's; experts that
    differ in dtype among themselves are promoted to their common dtype.

    Args:
        base: the base's tensors that need experts, by name.
        experts: as in `read_experts`.
        known: further floating-point names that experts may have and that are not read.
        tied: {further name: name in base} of tied tensors; an expert may have any of the names,
            and where it has several they must hold equal values.
        allow_nonfinite: accept NaN and Inf.

    Returns:
        The K expert names, and for each name of `base` the K experts' tensors, of one dtype.

    Raises:
        TypeError: experts are no collection of models.
        ValueError: no experts; a missing or unknown tensor; wrong shape, dtype or device; meta,
            sparse or quantized tensors; NaN or Inf. Names expert and tensor.
    """
    models = read_experts(experts)
    for name, tensor in base.items():
        _check_tensor("base", name, tensor, allow_nonfinite)
    aliases: dict[str, list[str]] = {name: [name] for name in base}
    for alias, name in (tied or {}).items():
        if name in aliases and alias != name:
            aliases[name].append(alias)
    accepted = set(known).union(*aliases.values())
    tensors: dict[str, list[Tensor]] = {name: [] for name in base}
    for expert, model in models.items():
        _check_names(expert, model, aliases, accepted)
        for name, tensor in base.items():
            found = [alias for alias in aliases[name] if alias in model]
            for alias in found:
                _check_pair(expert, alias, model[alias], tensor)
                _check_equal(expert, found[0], alias, model)
            _check_tensor(expert, found[0], model[found[0]], allow_nonfinite)
            tensors[name].append(model[found[0]])
    return list(models), {name: _promoted(row) for name, row in tensors.items()}


def _check_names(expert, model, aliases, accepted):
    missing = [name for name, names in aliases.items() if not any(n in model for n in names)]
    if missing:
        raise ValueError(
            f"{expert}: tensor {missing[0]!r} is missing, expected as in base "
            f"({len(missing)} of {len(aliases)} tensors are missing)"
        )
    extra = [n for n, t in model.items() if n not in accepted and _is_inexact(t)]
    if extra:
        raise ValueError(
            f"{expert}: tensor {extra[0]!r} is not in base ({len(extra)} unknown tensors); "
            "exclude it if it is not to be merged"
        )


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized


def _check_pair(expert: str, name: str, found: Tensor, base: Tensor) -> None:
    if found.shape != base.shape:
        raise ValueError(
            f"{expert}: tensor {name!r} has shape {list(found.shape)}, "
            f"expected {list(base.shape)} as in base"
        )
    if found.device != base.device:
        raise ValueError(
            f"{expert}: tensor {name!r} is on {found.device}, expected {base.device} as in base"
        )


def _check_equal(expert: str, first: str, alias: str, model: Mapping[str, Tensor]) -> None:
    a, b = model[first], model[alias]
    if alias == first or a.data_ptr() == b.data_ptr():
        return
    if not bool(((a == b) | (a.isnan() & b.isnan())).all()):
        raise ValueError(
            f"{expert}: tensors {first!r} and {alias!r} differ, expected equal values: they are "
            "tied in base"
        )


def _check_tensor(model: str, name: str, tensor: Tensor, allow_nonfinite: bool) -> None:
    check_plain(model, name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        supported = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise ValueError(
            f"{model}: tensor {name!r} is {tensor.dtype}, expected one of {supported}; "
            "exclude it if it is not to be merged"
        )
    if not allow_nonfinite and not _is_finite(tensor):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{model}: tensor {name!r} has {count} NaN or Inf entries of {tensor.numel()}, "
            "expected finite values; allow_nonfinite=True accepts them"
        )


def check_plain(model: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError, naming the tensor, unless its values are plain strided memory."""
    if is_special(tensor):
        kind = (
            "on the meta device"
            if tensor.is_meta
            else f"sparse ({tensor.layout})"
            if tensor.layout != torch.strided
            else f"quantized ({tensor.dtype})"
            if tensor.is_quantized
            else f"a {type(tensor).__name__}"
        )
        raise ValueError(f"{model}: tensor {name!r} is {kind}, expected an ordinary dense tensor")


def _is_finite(tensor: Tensor) -> bool:
    """One read without a temporary: NaN reaches both extremes, Inf one of them."""
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _promoted(row: list[Tensor]) -> list[Tensor]:
    dtype = row[0].dtype
    for tensor in row:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in row]
