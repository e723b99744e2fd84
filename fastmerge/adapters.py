"""LoRA adapters as the low-rank deltas that they are, for `attach(deltas="lora")`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .checkpoint import LoraCheckpoint
from .checkpoint.lora import is_adapter
from .deltas import Deltas, Dense, LowRank, SharedDown
from .sources import LoadedModel, named_experts


def adapter_deltas(
    experts: Mapping[str, Any] | Sequence[Any],
    base: Mapping[str, Tensor],
    tied: Mapping[str, str],
    *,
    allow_nonfinite: bool = False,
    shared: bool = False,
) -> tuple[list[str], dict[str, Deltas]]:
    """The deltas of K adapters on one base, of the tensors that any of them changes.

    tau_k = s B_k A_k as `LowRank`, of rank 0 where an adapter leaves a tensor as it is; `Dense`
    where one has the tensor whole (`modules_to_save`).

    Args:
        experts: paths of adapter folders in PEFT's format, as a list or {name: path}.
        base: the base model's tensors.
        tied: {name in base: the name it is known by here} of its parameters.
        allow_nonfinite: accept NaN and Inf.
        shared: `SharedDown` for a tensor of which several adapters have the same A.

    Returns:
        The K names, and {parameter name: deltas} in the order of `tied`.

    Raises:
        ValueError: an expert is no adapter, an adapter does not fit, it changes one tensor under
            two names, or has NaN or Inf; names expert and tensor.

    Source: LoRA (arXiv 2106.09685), PEFT's storage of it.
    """
    named = named_experts(experts)
    opened = {name: _open(expert, name, base) for name, expert in named.items()}
    changes = [_changes(checkpoint, tied) for checkpoint in opened.values()]
    changed = set().union(*changes)
    deltas: dict[str, Deltas] = {}
    for name in dict.fromkeys(tied.values()):
        if name in changed:
            row = [
                (expert, checkpoint, change.get(name))
                for (expert, checkpoint), change in zip(opened.items(), changes, strict=True)
            ]
            form = _deltas(name, base[name], row, allow_nonfinite)
            deltas[name] = _sharing(form) if shared else form
    return list(named), deltas


def _open(expert: Any, name: str, base: Mapping[str, Tensor]) -> LoraCheckpoint:
    if not isinstance(expert, (str, PathLike)) or not is_adapter(expert):
        found = repr(str(expert)) if isinstance(expert, (str, PathLike)) else type(expert).__name__
        raise ValueError(
            f"{name}: {found} is no adapter folder in PEFT's format, expected one with "
            "deltas='lora'"
        )
    return LoraCheckpoint(LoadedModel(base), expert, name)


def _changes(checkpoint: LoraCheckpoint, tied: Mapping[str, str]) -> dict[str, str]:
    """{parameter name: name in the base} of what an adapter changes."""
    found: dict[str, str] = {}
    for key in checkpoint.changed:
        name = tied.get(key)
        if name is None:
            raise ValueError(f"{checkpoint.name}: {key!r} is adapted but no parameter of the model")
        if name in found:
            raise ValueError(
                f"{checkpoint.name}: {key!r} and {found[name]!r} are one tensor of the model, "
                "expected one adapter for it"
            )
        found[name] = key
    return found


def _deltas(
    name: str,
    base: Tensor,
    row: Sequence[tuple[str, LoraCheckpoint, str | None]],
    allow_nonfinite: bool,
) -> Deltas:
    down: list[Tensor] = []
    up: list[Tensor] = []
    whole: dict[int, Tensor] = {}
    dtype = torch.promote_types(base.dtype, torch.float32)
    for k, (expert, checkpoint, key) in enumerate(row):
        low, high = base.new_empty(0, *base.shape[1:]), base.new_empty(len(base), 0)
        factors = None if key is None else checkpoint.factors(key)
        if factors is not None:
            low, high = factors
        elif key is not None:
            whole[k] = checkpoint.read(key).to(base.device, dtype) - base.to(dtype)
        down.append(low.to(base.device, dtype))
        up.append(high.to(base.device, dtype))
        for tensor in (down[k], up[k], *([whole[k]] if k in whole else [])):
            if not allow_nonfinite and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{expert}: tensor {name!r} has NaN or Inf, expected finite values; "
                    "allow_nonfinite=True accepts them"
                )
    if not whole:
        return LowRank(down, up)
    if base.dim() < 2:
        taus = [whole.get(k, torch.zeros_like(base, dtype=dtype)) for k in range(len(row))]
    else:
        written = LowRank(down, up).task_vectors(base, dtype)
        taus = [whole.get(k, tau) for k, tau in enumerate(written)]
    return Dense([tau.to(base.dtype).contiguous() for tau in taus])


def _sharing(form: Deltas) -> Deltas:
    """The same with one down for all, if they are equal."""
    if not isinstance(form, LowRank) or len(form) < 2:
        return form
    (down, _), *others = factors = form.factors()
    if not len(down) or not all(torch.equal(down, other) for other, _ in others):
        return form
    return SharedDown(down.clone(), [up.contiguous() for _, up in factors])


def selected(deltas: Mapping[str, Deltas], names: Collection[str]) -> dict[str, Deltas]:
    """The deltas of some of the tensors.

    Raises:
        ValueError: there are none.
    """
    kept = {name: form for name, form in deltas.items() if name in names}
    if not kept:
        raise ValueError(
            f"no tensor that the adapters change is selected, of {len(deltas)}: {[*deltas][:5]}"
        )
    return kept
