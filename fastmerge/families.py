"""`similarity`: how alike checkpoints are, and which of them belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checking import Patterns, check_models, select_names, tied_names
from .methods._gram import full_gram
from .ops import exact_sums, row_gram
from .ops._library import row_width
from .sources import read_experts, read_tensors

BLOCK_ENTRIES = 1 << 22  # of one tensor, read at a time


@dataclass(frozen=True)
class Similarity:
    """Norms and cosines of K task vectors, or of K models.

    Attributes:
        names: the experts' names.
        norms: fp64 [K].
        cosines: fp64 [K, K]; 0 where one of the two is zero, 1 on the diagonal.
    """

    names: list[str]
    norms: Tensor
    cosines: Tensor

    def clusters(self, threshold: float) -> list[list[str]]:
        """Groups of experts in which every pair has a cosine of at least `threshold`.

        The two groups whose least cosine is the largest are joined, again and again, while that is
        no less than the threshold (complete linkage). Of equal ones the first are joined.

        Args:
            threshold: Model-GLUE's repository has 0.95, for the weights of whole models.

        Returns:
            Names, each group in the order of the experts, groups in the order of their first one.
        """
        groups = [[k] for k in range(len(self.names))]
        while True:
            pairs = [(a, b) for a in range(len(groups)) for b in range(a + 1, len(groups))]
            found = max(pairs, key=lambda pair: self._least(groups, *pair), default=None)
            if found is None or self._least(groups, *found) < threshold:
                return [[self.names[k] for k in group] for group in groups]
            first, second = found
            groups[first] = sorted(groups[first] + groups.pop(second))

    def _least(self, groups: Sequence[Sequence[int]], first: int, second: int) -> float:
        return float(self.cosines[groups[first]][:, groups[second]].min())


def similarity(
    base: nn.Module | Mapping[str, Tensor] | str | Path | None,
    experts: Any,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Similarity:
    """Norms and cosines of the experts' task vectors over the whole model, block by block.

    <tau_i, tau_j> = sum over all tensors, in fp64 and exact in the order of blocks. Checkpoint
    folders are mapped into memory, not loaded.

    Args:
        base: module, state dict, folder or file of a checkpoint; None compares the weights
            themselves, whose cosines are all close to 1 where models have one origin.
        experts: K models, as for `fastmerge.merge`; folders too.
        include, exclude: which tensors count: glob patterns or a function of the name.

    Raises:
        ValueError: models do not fit each other; names the tensor and the expert.

    Source: Model-GLUE (arXiv 2410.05357), which compares weights and averages over columns.
    """
    origin = None if base is None else _tensors(base)
    models = read_experts(experts, origin)
    reference = origin if origin is not None else next(iter(models.values()))
    tied = tied_names(reference)
    names = select_names(
        [n for n, t in reference.items() if t.is_floating_point() and tied[n] == n],
        include,
        exclude,
    )
    chosen = {name: reference[name] for name in names}
    others = {name for tensors in (reference, *models.values()) for name in tensors}
    labels, tensors = check_models(chosen, models, known=others - set(names), tied=tied)
    total: Tensor | None = None
    for name in names:
        start = None if origin is None else origin[name]
        for deltas, rows in _blocks(tensors[name], start):
            limbs = exact_sums(row_gram(deltas, base=rows, width=_width(deltas[0]))).cpu()
            total = limbs if total is None else total + limbs
    gram = full_gram(total)
    norms = gram.diagonal().sqrt()
    sizes = norms.unsqueeze(1) * norms
    cosines = torch.where(sizes > 0, gram / sizes.clamp(min=torch.finfo(gram.dtype).tiny), 0.0)
    return Similarity(labels, norms, cosines.clamp(-1, 1).fill_diagonal_(1.0))


def _tensors(base: Any) -> dict[str, Tensor]:
    if isinstance(base, (str, Path)):
        return read_experts({"base": base})["base"]
    return read_tensors(base, "base")


def _blocks(
    deltas: list[Tensor], base: Tensor | None
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Rows of the experts and of the base, some at a time."""
    first = deltas[0]
    if first.dim() == 0:
        yield deltas, base
        return
    step = max(1, BLOCK_ENTRIES // max(1, first[:1].numel()))
    for start in range(0, len(first), step):
        rows = slice(start, start + step)
        yield [delta[rows] for delta in deltas], None if base is None else base[rows]


def _width(tensor: Tensor) -> int:
    """Entries that are added up at once: a row, all of a vector."""
    return max(1, tensor.numel()) if tensor.dim() < 2 else row_width(tensor)
