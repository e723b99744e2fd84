"""`ties` on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import extensions
from ..arguments import code
from . import calls


def ties_merge(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    thresholds: Tensor,
    out: Tensor,
    *,
    experts: bool = False,
    mode: int = 0,
    scaling: float = 1.0,
    majority: int | None = 0,
    add_base: bool = False,
) -> Tensor:
    """Trim, elect and merge one tensor into `out`.

    out = scaling * merge of the kept tau_k that have the elected sign, plus base with `add_base`.

    Args:
        base: needed with `experts` or `add_base`.
        deltas: K tensors of one size.
        thresholds: fp32 [K]; tau_k is kept where |tau_k| >= thresholds[k].
        out: tensor of that size; may be base.
        mode: 0 mean, 1 sum, 2 largest magnitude.
        majority: the sign, -1, 0 or 1, where the kept values add up to zero; None takes the
            majority that the returned votes give.

    Returns:
        int64 [2]: the sum of the elected signs before `majority`, and the number of entries whose
        kept values cancel exactly.
    """
    if majority is None:
        # A first merge must not overwrite the base that the second one reads.
        shared = base is not None and _memory(base) == _memory(out)
        arguments = (base.clone() if shared else base, deltas, thresholds, out)
        options = dict(experts=experts, mode=mode, scaling=scaling, add_base=add_base)
        return _own_majority(lambda sign: ties_merge(*arguments, majority=sign, **options))
    stats = torch.empty(2, dtype=torch.int64)
    extensions.cpu.ties_merge(
        calls.task_vectors(base, deltas, experts),
        thresholds.data_ptr(),
        out.data_ptr(),
        stats.data_ptr(),
        out.numel(),
        code([out]),
        mode,
        scaling,
        majority,
        add_base,
        torch.get_num_threads(),
    )
    return stats


def ties_masks(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    thresholds: Tensor,
    masks: Tensor,
    *,
    experts: bool = False,
    majority: int | None = 0,
) -> Tensor:
    """Write which entries of each tau_k TIES keeps and elects as packed bits.

    Args:
        masks: uint8 [K, ceil(n / 8)]: entry i is bit i % 8 of byte i // 8, unused bits are 0.
        base, deltas, thresholds, experts, majority: as in `ties_merge`.

    Returns:
        int64 [2] as from `ties_merge`.
    """
    if majority is None:
        arguments = (base, deltas, thresholds, masks)
        return _own_majority(lambda sign: ties_masks(*arguments, experts=experts, majority=sign))
    stats = torch.empty(2, dtype=torch.int64)
    extensions.cpu.ties_masks(
        calls.task_vectors(base, deltas, experts),
        thresholds.data_ptr(),
        masks.data_ptr(),
        stats.data_ptr(),
        deltas[0].numel(),
        majority,
        torch.get_num_threads(),
    )
    return stats


def _own_majority(run: Callable[[int], Tensor]) -> Tensor:
    """Votes of run(0), which is followed by a run with their majority if that decides an entry."""
    stats = run(0)
    signs, cancelled = stats.tolist()
    if cancelled and signs:
        run(1 if signs > 0 else -1)
    return stats


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
