"""Twin-Merging of LoRA adapters whose two factors are merged each by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters import adapter_deltas
from ..decomposition import low_rank_factors
from ..deltas import Dense, FactorPairs, LowRank


def factor_pairs(
    experts: Mapping[str, Any] | Sequence[Any],
    base: Mapping[str, Tensor],
    tied: Mapping[str, str],
    *,
    scaling: float,
    rank: int,
    svd: str = "auto",
    seed: int = 0,
    allow_nonfinite: bool = False,
) -> tuple[list[str], dict[str, FactorPairs]]:
    """What Twin-Merging's code makes of K adapters: shared factors, and what each has beyond them.

    A_s = scaling sum_k A_k, a_k = the best of rank r of A_k - A_s, and so for B. With weights w the
    layer computes base + (B_s + sum_k w_k b_k) (A_s + sum_k w_k a_k). LoRA's own scaling is in one
    of the factors.

    Args:
        experts, base, tied, allow_nonfinite: as for `adapters.adapter_deltas`.
        scaling: lambda of task arithmetic on the factors.
        rank: of what is kept of a factor; 8 in the code.
        svd, seed: of the decomposition.

    Returns:
        The K names, and the deltas of every tensor that the adapters change.

    Raises:
        ValueError: adapters of different ranks, or tensors that not all of them adapt.

    Source: Twin-Merging's code (arXiv 2406.15479).
    """
    tasks, deltas = adapter_deltas(experts, base, tied, allow_nonfinite=allow_nonfinite)
    pairs: dict[str, FactorPairs] = {}
    for name, form in deltas.items():
        if not isinstance(form, LowRank) or len(set(form.ranks)) > 1:
            found = list(form.ranks) if isinstance(form, LowRank) else "whole tensors"
            raise ValueError(
                f"{name!r}: the adapters have ranks {found}, but factors that are merged by "
                "themselves need one rank in all of them: use lora='product'"
            )
        low, high = ([f[i] for f in form.factors()] for i in (0, 1))
        down, downs = _shared_and_rests(low, scaling, rank, svd, seed)
        up, ups = _shared_and_rests(high, scaling, rank, svd, seed)
        pairs[name] = FactorPairs(down, up, downs, ups)
    return tasks, pairs


def _shared_and_rests(
    factors: Sequence[Tensor], scaling: float, rank: int, svd: str, seed: int
) -> tuple[Tensor, Dense]:
    shared = scaling * torch.stack(list(factors)).sum(0)
    rests = []
    for factor in factors:
        rest = factor - shared
        matrix = rest.flatten(1)
        if rank < min(matrix.shape):
            down, up = low_rank_factors(matrix, rank, method=svd, seed=seed)
            rest = (up @ down).view(rest.shape)
        rests.append(rest.contiguous())
    return shared, Dense(rests)
