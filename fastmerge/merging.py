"""`merge`: models in, a merged model out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checking import (
    STATISTICS,
    Patterns,
    check_models,
    check_plain,
    is_selected,
    matches,
    running_statistics,
    select_names,
    tied_names,
)
from .coefficients import Coefficients, load_coefficients
from .concrete_mask import ConcreteMask, load_mask
from .jobs.door import merge_folders
from .merged_weight import MergedWeight
from .methods import Block, ConcreteWeighted, Method, Weighted, make_method, run_passes
from .ops._library import accumulate_dtype
from .sources import read_experts, read_tensors


def merge(
    base: nn.Module | Mapping[str, Tensor] | str | Path,
    experts: Any,
    method: str | Method | None = None,
    coefficients: Coefficients | Tensor | str | Path | None = None,
    *,
    mask: ConcreteMask | str | Path | None = None,
    out: str | Path | None = None,
    job: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    allow_nonfinite: bool = False,
    progress: bool = False,
    seed: int = 0,
    **params: Any,
) -> nn.Module | dict[str, Tensor] | Path:
    """Merge experts that were fine-tuned from one base model.

    Merged are the floating-point parameters: of a module its parameters, of a state dict all
    floating-point tensors. Running means and variances of normalization layers become the mean of
    the experts'. Everything else is the base's: integer and bool tensors, other buffers of a
    module, excluded tensors. Tensors that are tied in the base are computed once and stay tied.
    Everything is checked before anything is computed, and the result shares no memory with the
    inputs.

    Checkpoint folders are merged into a new folder, block by block in bounded memory, with the
    same values.

    Args:
        base: module, state dict, or folder of a checkpoint.
        experts: K models like base, as a list or {name: expert}: modules, state dicts or paths of
            checkpoints or LoRA adapters (`fastmerge.sources`), in any floating-point dtype; folders
            if base is one. They may lack, or differ in, tensors that are not merged.
        method: a name from `fastmerge.methods.METHODS`, or a `Method`. Either this or
            coefficients.
        coefficients: theta = theta_0 + sum_k lambda_k tau_k with learned or given lambda: a
            `Coefficients` module or the path of its file, which also choose the tensors to be
            merged; or a tensor, [K] or [L, K] with one row per merged tensor in the base's order,
            tied tensors once. Folders need `names` with [L, K].
        mask: with coefficients, a mask that multiplies all task vectors, or its file
            (`fastmerge.learn_mask`); it must have exactly the tensors that are merged. Not for
            folders.
        out: the folder to be made, if base is one.
        job: options of a job on folders, for example {"max_memory": 1 << 30, "resume": True}: the
            keywords of `fastmerge.jobs.engine.run`.
        names: names of the L tensors that the rows of a [L, K] tensor belong to; these are merged.
        include, exclude: which tensors are merged: glob patterns, or a function of the name.
        allow_nonfinite: accept NaN and Inf in base and experts.
        progress: show a progress bar.
        seed: for methods that draw random numbers; they depend on the seed, the tensor's name, the
            expert's position and the entry's index, and on nothing else.
        params: the method's parameters, for example density=0.2.

    Returns:
        A module if base is one (a deep copy with merged weights), a state dict if base is one, else
        the path of the new folder. Each tensor has the base's dtype.

    Raises:
        ValueError: models that do not fit each other, coefficients that do not fit the models,
            or a parameter out of range. Names the tensor and the expert.
        TypeError: an unknown parameter, or an argument of the wrong kind.
    """
    if (method is None) == (coefficients is None):
        raise ValueError("merge: give either method or coefficients")
    if coefficients is not None and params:
        raise TypeError(f"merge: coefficients take no parameter {next(iter(params))!r}")
    if mask is not None and (coefficients is None or isinstance(base, (str, Path))):
        raise ValueError("merge: a mask belongs to coefficients and models in memory")
    if names is not None and not isinstance(coefficients, Tensor):
        raise ValueError("merge: names belong to coefficients given as a [L, K] tensor")
    if isinstance(method, str):
        method = make_method(method, **params)
    elif params:
        raise TypeError(f"merge: a Method object takes no parameter {next(iter(params))!r}")
    if isinstance(coefficients, (str, Path)):
        coefficients = load_coefficients(coefficients)
    if isinstance(coefficients, Coefficients):
        names = coefficients.names

    if isinstance(base, (str, Path)):
        if out is None:
            raise ValueError("merge: checkpoint folders need out, the folder to be made")
        return merge_folders(
            base,
            experts,
            out,
            method,
            coefficients,
            names=names,
            select=lambda found: _selected(found, include, exclude),
            seed=seed,
            settings=params,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            **(job or {}),
        )
    if out is not None or job is not None:
        raise TypeError("merge: out and job belong to checkpoint folders")
    if isinstance(base, nn.Module):
        _refuse_attached(base)
    originals = read_tensors(base, "base")
    models = read_experts(experts, originals)
    tied = tied_names(originals)
    others = {n for tensors in (originals, *models.values()) for n in tensors}
    for name, tensor in originals.items():
        if is_selected(name, include, exclude):
            check_plain("base", name, tensor)
    chosen = select_names(
        _candidates(base, originals, tied, names), include, exclude, others=others
    )
    averaged = [
        name
        for name in running_statistics(originals)
        if tied[name] == name and not matches(name, exclude)
    ]
    checked = {name: originals[name] for name in (*chosen, *averaged)}
    not_merged = {name for name in others if not is_selected(name, include, exclude)}
    expert_names, tensors = check_models(
        checked, models, known=not_merged.union(tied), tied=tied, allow_nonfinite=allow_nonfinite
    )
    bases = {name: originals[name] for name in chosen}
    if coefficients is not None:
        if isinstance(coefficients, Coefficients):
            _check_shapes(coefficients, originals)
            matrix = _in_order(coefficients, expert_names, isinstance(experts, Mapping))
            _check_matrix(matrix, len(coefficients.labels), len(expert_names))
            method = _weighted(coefficients, matrix, tied, bases)
        else:
            rows = None if names is None else [tied[name] for name in names]
            method = Weighted(_rows(coefficients, rows, chosen, len(expert_names)))
        if mask is not None:
            method = _masked(method, mask, bases)
    method.check(chosen, expert_names)

    result = _Result(base, originals, tied)
    for name in averaged:
        result.put(name, _mean(tensors[name]))
    with torch.no_grad():
        for name, merged in _merged(method, bases, tensors, progress, seed):
            result.put(name, merged)
    return result.finished()


def _selected(names: Sequence[str], include: Patterns, exclude: Patterns) -> set[str]:
    """Names of a checkpoint's tensors that are merged, or averaged as running statistics are."""
    statistics = {name for name in names if name.rpartition(".")[2] in STATISTICS}
    others = [name for name in names if name not in statistics]
    chosen = select_names(others, include, exclude, others=statistics)
    return {*chosen, *(name for name in statistics if not matches(name, exclude))}


def _refuse_attached(base: nn.Module) -> None:
    for name, parameter in base.named_parameters():
        if isinstance(parameter, MergedWeight):
            raise ValueError(
                f"base: parameter {name!r} is a merged weight already; call fastmerge.detach or "
                "fastmerge.materialize first"
            )


def _candidates(
    base: nn.Module | Mapping[str, Tensor],
    originals: Mapping[str, Tensor],
    tied: Mapping[str, str],
    rows: Sequence[str] | None,
) -> list[str]:
    """First names of the tensors that can be merged, those of `rows` if given, in base's order."""
    excepted = set(running_statistics(originals))
    if isinstance(base, nn.Module):
        parameters = {name for name, _ in base.named_parameters(remove_duplicate=False)}
        excepted |= set(originals) - parameters
    candidates = [
        name
        for name, tensor in originals.items()
        if name not in excepted
        and tied[name] == name
        and (tensor.is_floating_point() or tensor.is_complex())
    ]
    if rows is None:
        return candidates
    first = [tied.get(name, name) for name in rows]
    unknown = [
        name for name, found in zip(rows, first, strict=True) if found not in set(candidates)
    ]
    if unknown:
        raise ValueError(
            f"coefficients: a row belongs to {unknown[0]!r}, which is no floating-point parameter "
            f"of base ({len(unknown)} such of {len(rows)} rows)"
        )
    twice = [name for name, found in zip(rows, first, strict=True) if first.count(found) > 1]
    if twice:
        raise ValueError(f"coefficients: two rows for one tensor of base: {', '.join(twice)}")
    return [name for name in candidates if name in set(first)]


def _check_shapes(coefficients: Coefficients, originals: Mapping[str, Tensor]) -> None:
    for name, shape in zip(coefficients.names, coefficients.shapes or (), strict=False):
        if list(originals[name].shape) != list(shape):
            raise ValueError(
                f"coefficients of another model: tensor {name!r} has shape {list(shape)} there, "
                f"{list(originals[name].shape)} in base"
            )


def _in_order(coefficients: Coefficients, experts: list[str], named: bool) -> Tensor:
    """[L, K] with columns in the order of the experts, matched by name where both have names."""
    matrix, theirs = coefficients.matrix(), coefficients.experts
    unnamed = theirs == [f"expert{k}" for k in range(len(theirs))]
    if len(theirs) != len(experts) or not named or unnamed:
        return matrix
    if set(theirs) != set(experts):
        raise ValueError(f"coefficients are for experts {theirs}, got {experts}")
    return matrix[:, [theirs.index(name) for name in experts]]


def _weighted(
    coefficients: Coefficients,
    matrix: Tensor,
    tied: Mapping[str, str],
    bases: Mapping[str, Tensor],
) -> Weighted:
    """The method that merges with learned coefficients, chunk by chunk where they have chunks."""
    rows = {}
    for name, part in zip(coefficients.names, matrix.split(coefficients.chunks), strict=True):
        rows[tied[name]] = part if len(part) > 1 else part[0]
    heights = {name: len(tensor) for name, tensor in bases.items() if tensor.dim()}
    return Weighted(rows, heights)


def _masked(
    method: Weighted, mask: ConcreteMask | str | Path, bases: Mapping[str, Tensor]
) -> ConcreteWeighted:
    """The same coefficients under a mask of these tensors."""
    source = "mask" if isinstance(mask, ConcreteMask) else str(mask)
    mask = mask if isinstance(mask, ConcreteMask) else load_mask(mask)
    mask.check_same({name: tensor.shape for name, tensor in bases.items()}, source)
    return ConcreteWeighted(method.rows, method.heights, mask.draws)


def _rows(
    matrix: Any, names: Sequence[str] | None, chosen: list[str], count: int
) -> dict[str, Tensor]:
    """Coefficients [K] of each chosen tensor.

    `names` are the tensors that the rows of `matrix` belong to, by default the chosen ones.
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(
            "coefficients: expected a tensor, Coefficients or a file's path, "
            f"got {type(matrix).__name__}"
        )
    names = chosen if names is None else names
    _check_matrix(matrix, len(names), count)
    rows = dict(zip(names, matrix.detach().expand(len(names), count).unbind(), strict=True))
    return {name: rows[name] for name in chosen}


def _check_matrix(matrix: Tensor, rows: int, count: int) -> None:
    if list(matrix.shape) not in ([count], [rows, count]):
        raise ValueError(
            f"coefficients have shape {list(matrix.shape)}, expected [{count}] or "
            f"[{rows}, {count}]: {rows} tensors, {count} experts"
        )
    if not matrix.is_floating_point() or not torch.isfinite(matrix).all():
        raise ValueError("coefficients must be finite floating-point numbers")


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    accumulate = accumulate_dtype(tensors[0])
    return torch.stack([t.to(accumulate) for t in tensors]).mean(0)


def _merged(
    method: Method,
    bases: Mapping[str, Tensor],
    tensors: Mapping[str, list[Tensor]],
    progress: bool,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """Run a method's passes, then combine tensor after tensor."""

    def blocks(doing: str = "measuring") -> Iterator[Block]:
        for name in _track(bases, doing, progress):
            yield Block(name, bases[name], tensors[name], seed=seed)

    everything = (*bases.values(), *(t for name in bases for t in tensors[name]))
    stats = run_passes(method.passes(accumulate_dtype(*everything)), blocks)
    for block in blocks("merging"):
        yield block.name, method.combine(block, stats.of(block.name))


def _track(names: Mapping[str, Any], doing: str, progress: bool) -> Iterable[str]:
    if not progress:
        return names
    from rich.progress import track  # here, so that importing fastmerge stays cheap

    return track(names, description=doing)


class _Result:
    """The merged model under construction: a copy of the base that merged tensors are put into.

    Args:
        base: the model whose kind the result has.
        originals: its tensors.
        tied: first name of every tensor's memory.
    """

    def __init__(
        self,
        base: nn.Module | Mapping[str, Tensor],
        originals: Mapping[str, Tensor],
        tied: Mapping[str, str],
    ):
        self.base, self.originals, self.tied = base, originals, tied
        self.module = copy.deepcopy(base) if isinstance(base, nn.Module) else None
        self.slots = dict(self.module.state_dict()) if self.module is not None else {}
        self.computed: dict[str, Tensor] = {}

    def put(self, name: str, values: Tensor) -> None:
        """Give a tensor, and those tied to it, its merged values."""
        if self.module is not None:
            self.slots[name].copy_(values)
        else:
            self.computed[name] = values.to(self.originals[name].dtype)

    def finished(self) -> nn.Module | dict[str, Tensor]:
        """The merged model."""
        if self.module is not None:
            return self.module
        result = copy.copy(self.base) if isinstance(self.base, dict) else {}
        for name, original in self.originals.items():
            first = self.tied[name]
            if first not in self.computed:
                self.computed[first] = original.clone()
            result[name] = self.computed[first]
        return result
