"""Passes that find exact order statistics of magnitudes, whatever the blocks.

Histograms of the magnitudes' bits give the value c at a rank, as in `magnitude_threshold`. Where
several entries are equal to c and only some of them belong above the cut, those of lowest index do:
two more histograms, over the indices of the entries equal to c, find the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..ops import magnitude_masks, tie_counts
from ..ops.magnitude_threshold import (
    BINS,
    LEVEL_BITS,
    counts_nonfinite,
    find_rank,
    magnitude_of_bits,
    refine,
)
from ._gram import task_points
from ._method import Block, Pass, Stats

Source = Callable[[Block], tuple[list[Tensor], Tensor | None]]
Counts = Callable[[int, Sequence[int]], list[list[int]]]


@dataclass(frozen=True)
class Cut:
    """One cut of the order of magnitudes, while it is being found.

    Attributes:
        delta: which tensor's magnitudes.
        count: how many entries are above it.
        bits: the high bits of c found so far.
        position: position of c, from 1 and the smallest, among the magnitudes with these bits.
        equal: how many magnitudes have these bits.
        index: entries equal to c are above the cut if their index is below this.
    """

    delta: int
    count: int
    bits: int
    position: int
    equal: int
    index: int

    @property
    def ties(self) -> int:
        """How many of the entries equal to c are above the cut."""
        return self.equal - self.position + 1


@dataclass(frozen=True)
class Found:
    """What is known of one tensor's cuts.

    Attributes:
        total: entries of the tensor.
        counts: entries above the cuts of each delta.
        cuts: those with entries above and below.
        dtype: dtype of the arithmetic.
        settled: whether nothing is left to be found.
    """

    total: int
    counts: list[list[int]]
    cuts: tuple[Cut, ...]
    dtype: torch.dtype
    settled: bool = False

    def open(self) -> list[Cut]:
        """Cuts that leave some of the entries equal to c below them."""
        return [] if self.settled else [cut for cut in self.cuts if cut.ties < cut.equal]

    def changed(self, new: Sequence[Cut]) -> Found:
        """The same with some cuts known better."""
        better = {(cut.delta, cut.count): cut for cut in new}
        cuts = tuple(better.get((cut.delta, cut.count), cut) for cut in self.cuts)
        return replace(self, cuts=cuts)

    def ends(self) -> list[list[tuple[float, int]]]:
        """(c, index) of every cut of every delta."""
        ends = {
            (cut.delta, cut.count): (magnitude_of_bits(cut.bits, self.dtype).item(), cut.index)
            for cut in self.cuts
        }
        for delta, counts in enumerate(self.counts):
            if self.total in counts:
                ends[delta, self.total] = (0.0, self.total)
            if 0 in counts:
                ends[delta, 0] = (math.inf, 0)
        return [[ends[k, count] for count in row] for k, row in enumerate(self.counts)]

    @property
    def width(self) -> int:
        """Indices that the first histogram of indices counts together: about as many as it has
        bins, so that both histograms are short."""
        return max(1, math.isqrt(self.total))

    @property
    def bins(self) -> int:
        """Bins of the first histogram of indices."""
        return -(-self.total // self.width)


def cut_values(stats: Stats) -> list[list[float]]:
    """c of every cut of every delta, once the passes of `Cuts` are done."""
    return [[c for c, _ in row] for row in stats["cuts"].ends()]


def cut_masks(source: Source, block: Block, stats: Stats) -> Tensor:
    """Entries above the second and not above the first of each delta's two cuts, packed bits.

    Args:
        source: that of the `Cuts`.

    Returns:
        uint8 [K, ceil(n / 8)].
    """
    tensors, base = source(block)
    found, device = stats["cuts"], tensors[0].device
    ends = found.ends()
    return magnitude_masks(
        tensors,
        torch.tensor([[c for c, _ in row] for row in ends], dtype=found.dtype, device=device),
        torch.tensor([[i for _, i in row] for row in ends], device=device),
        base=base,
        offset=block.offset,
    )


class Cuts:
    """Cuts of the magnitudes of a tensor's deltas, with exact numbers of entries above them.

    Args:
        source: block -> its tensors, and the base to subtract from them or None.
        counts: (entries of the tensor, entries that are not 0 for each delta) -> for each delta the
            numbers of entries above its cuts, from 0 to the tensor's entries.
        dtype: dtype of the arithmetic.
        ties: whether equal magnitudes are told apart by their indices, for `cut_masks`.
    """

    def __init__(self, source: Source, counts: Counts, dtype: torch.dtype, ties: bool = True):
        self.source, self.counts, self.dtype, self.ties = source, counts, dtype, ties

    def passes(self) -> list[Pass]:
        """The measure passes; stats["cuts"] is what `cut_values` and `cut_masks` need."""
        return [*self.value_passes(), *(self._tie_passes() if self.ties else ())]

    def value_passes(self) -> list[Pass]:
        """Those that find the magnitudes c."""
        # A delta has a NaN or Inf wherever the base or its expert has.
        tells = partial(counts_nonfinite, dtype=self.dtype) if self.source is task_points else None
        return [
            Pass(
                "cuts",
                "tensor",
                partial(self._histograms, level=level),
                finish=partial(self._descend, level=level),
                nonfinite=None
                if level or not tells
                else partial(counts_nonfinite, dtype=self.dtype),
            )
            for level in range(len(LEVEL_BITS[self.dtype]))
        ]

    def _tie_passes(self) -> list[Pass]:
        """Those that find the last entry equal to c that is above the cut."""
        return [
            Pass("cuts", "tensor", measure, finish=finish, needed=lambda s: bool(s["cuts"].open()))
            for measure, finish in (
                (self._index_bins, self._find_bin),
                (self._indices_in_bin, self._find_index),
            )
        ]

    def _histograms(self, block: Block, stats: Stats, level: int) -> Tensor:
        tensors, base = self.source(block)
        if level == 0:
            wanted = [(tensor, 0) for tensor in tensors]
        else:
            wanted = [(tensors[cut.delta], cut.bits) for cut in stats["cuts"].cuts]
        rows = [
            torch.ops.fastmerge.magnitude_histogram(
                tensor, base, level, bits, self.dtype == torch.float64
            )
            for tensor, bits in wanted
        ]
        return torch.stack(rows).cpu() if rows else torch.zeros(0, BINS, dtype=torch.int64)

    def _descend(self, histograms: Tensor, stats: Stats, level: int) -> Found:
        if level == 0:
            total = int(histograms[0].sum())
            counts = self.counts(total, [total - int(row[0]) for row in histograms])
            cuts = tuple(
                Cut(k, count, 0, total - count + 1, total, total)
                for k, row in enumerate(counts)
                for count in sorted(set(row) - {0, total})
            )
            found = Found(total, counts, cuts, self.dtype)
            rows = [histograms[cut.delta] for cut in cuts]
        else:
            found, rows = stats["cuts"], list(histograms)
        new = []
        for cut, row in zip(found.cuts, rows, strict=True):
            bits, position = refine(row, level, cut.bits, cut.position, self.dtype)
            low = bits & ((1 << LEVEL_BITS[self.dtype][level]) - 1)
            new.append(replace(cut, bits=bits, position=position, equal=int(row[low])))
        return found.changed(new)

    def _tie_counts(
        self, block: Block, cuts: Sequence[Cut], starts: Sequence[int], width: int, bins: int
    ) -> Tensor:
        """How many entries equal each cut's c in each bin of indices, int64 [cuts, bins]."""
        if not cuts:
            return torch.zeros(0, bins, dtype=torch.int64)
        tensors, base = self.source(block)
        values = torch.stack([magnitude_of_bits(cut.bits, self.dtype) for cut in cuts])
        counts = tie_counts(
            [tensors[cut.delta] for cut in cuts],
            values.to(tensors[0].device),
            torch.tensor(starts, device=tensors[0].device),
            width=width,
            bins=bins,
            base=base,
            offset=block.offset,
        )
        return counts.cpu()

    def _index_bins(self, block: Block, stats: Stats) -> Tensor:
        found: Found = stats["cuts"]
        cuts = found.open()
        return self._tie_counts(block, cuts, [0] * len(cuts), found.width, found.bins)

    def _find_bin(self, histograms: Tensor, stats: Stats) -> Found:
        """Each open cut gets its bin as `index`, and `position` counts from the bin's start."""
        found: Found = stats["cuts"]
        new = []
        for cut, row in zip(found.open(), histograms, strict=True):
            bin_, left = find_rank(row, cut.ties)
            new.append(replace(cut, index=bin_ * found.width, position=cut.equal - left + 1))
        return found.changed(new)

    def _indices_in_bin(self, block: Block, stats: Stats) -> Tensor:
        found: Found = stats["cuts"]
        cuts, start, stop = found.open(), block.offset, block.offset + block.experts[0].numel()
        rows = torch.zeros(len(cuts), found.width, dtype=torch.int64)
        here = [
            row
            for row, cut in enumerate(cuts)
            if found.width > 1 and cut.index < stop and start < cut.index + found.width
        ]
        chosen = [cuts[row] for row in here]
        starts = [cut.index for cut in chosen]
        rows[here] = self._tie_counts(block, chosen, starts, 1, found.width)
        return rows

    def _find_index(self, histograms: Tensor, stats: Stats) -> Found:
        found: Found = stats["cuts"]
        new = []
        for cut, row in zip(found.open(), histograms, strict=True):
            within = find_rank(row, cut.ties)[0] if found.width > 1 else 0
            new.append(replace(cut, index=cut.index + within + 1))
        return found.changed(new)
