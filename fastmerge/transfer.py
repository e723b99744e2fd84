"""`transfer_coefficients`: coefficients learned on one model for another of a different depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import Place, place_of
from .checking import Patterns, select_names
from .coefficients import Coefficients

Kind = tuple[str, str]


def transfer_coefficients(
    coefficients: Coefficients,
    target: nn.Module | Mapping[str, Sequence[int]],
    *,
    interpolate: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Coefficients:
    """Coefficients for another model of the same family, by relative position of its blocks.

    Block b of B blocks (counted from 1) takes the coefficients of block ceil(b S / B) of the S
    blocks of the model they were learned on, tensor by tensor of the same name within the block;
    tensors outside all blocks keep theirs. With `interpolate` the blocks' positions (b - 1) / (B -
    1) are compared instead, and coefficients between two blocks are interpolated linearly.

    Blocks are found by name (`fastmerge.blocks`) and counted per list of blocks, and among those
    that have the tensor: an encoder's and a decoder's, or stages of different depth, apart.

    Args:
        coefficients: what was learned, of any granularity and parametrization.
        target: the model they are for, or the shapes of its tensors by name.
        interpolate: interpolate between blocks instead of copying one.
        include, exclude: which of the target's parameters get coefficients: glob patterns or a
            function of the name.

    Returns:
        Coefficients of the target's tensors, one row per tensor (or chunk, if the source has
        chunks), with the values as raw ones and the same clamp; pass them to `fastmerge.attach`
        as `init`, or save them.

    Raises:
        ValueError: a tensor of the target has no counterpart, or one with other chunks.

    Source: the relative-depth mapping of coefficients found on a small model (arXiv 2610.07819).
    """
    if isinstance(target, nn.Module):
        shapes = {n: list(p.shape) for n, p in target.named_parameters() if p.is_floating_point()}
    else:
        shapes = {name: list(shape) for name, shape in target.items()}
    names = select_names(list(shapes), include, exclude)
    source = dict(
        zip(coefficients.names, coefficients.matrix().split(coefficients.chunks), strict=True)
    )
    theirs, ours = _by_kind(coefficients.names), _by_kind(names)
    rows = [
        _rows_for(name, ours[_kind(place_of(name))], theirs, source, interpolate) for name in names
    ]
    chunks = {name: len(row) for name, row in zip(names, rows, strict=True)}
    chunked = coefficients.granularity == "chunk"
    return Coefficients(
        names,
        coefficients.experts,
        granularity="chunk" if chunked else "layer",
        init=torch.cat(rows),
        clamp=coefficients.clamp,
        shapes=[shapes[name] for name in names],
        chunks=chunks if chunked else None,
    )


def _kind(place: Place) -> Kind:
    return place.container, place.rest


def _by_kind(names: Sequence[str]) -> dict[Kind, list[str]]:
    """Names of the same tensor in all blocks of a list, in the order of the blocks."""
    kinds: dict[Kind, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(place_of(name)), []).append(name)
    return {kind: sorted(found, key=lambda n: place_of(n).number or 0)
            for kind, found in kinds.items()}  # fmt: skip


def _rows_for(
    name: str,
    siblings: list[str],
    theirs: Mapping[Kind, list[str]],
    source: Mapping[str, Tensor],
    interpolate: bool,
) -> Tensor:
    """[chunks, K] for one tensor of the target."""
    found = theirs.get(_kind(place_of(name)))
    if found is None:
        raise ValueError(
            f"transfer_coefficients: there are none for {name!r} or its like in other blocks; "
            "exclude it if it is not to be merged"
        )
    index, blocks, count = siblings.index(name), len(siblings), len(found)
    if not interpolate:
        return source[found[-(-(index + 1) * count // blocks) - 1]]
    position = index * (count - 1) / (blocks - 1) if blocks > 1 else (count - 1) / 2
    low = min(int(position), count - 1)
    high = min(low + 1, count - 1)
    first, second = source[found[low]], source[found[high]]
    if len(first) != len(second):
        raise ValueError(
            f"transfer_coefficients: {found[low]!r} has {len(first)} chunks and {found[high]!r} "
            f"{len(second)}, expected equal numbers to interpolate"
        )
    return torch.lerp(first, second, position - low)
