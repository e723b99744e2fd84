"""Where a tensor sits in a model, read from its name: which list of blocks, which block of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_INNER_LISTS = ("blocks", "layers")
_INPUT_PARTS = ("embed", "emb.", "wte", "wpe", "patch", "cls_token")
_OUTPUT_PARTS = ("embed_out", "output_embed")


class Place(NamedTuple):
    """A tensor's place in a model.

    Attributes:
        container: name of the list of blocks, for example "encoder.layers"; "" at the top.
        number: position of the block in that list, None for a tensor outside all blocks.
        rest: name within the block, for example "attention.query.weight"; outside the whole name.
    """

    container: str
    number: int | None
    rest: str

    @property
    def block(self) -> str:
        """Label of its block, "encoder.layers.3"; outside all blocks its module's name."""
        if self.number is None:
            return self.rest.rpartition(".")[0] or self.rest
        return f"{self.container}.{self.number}" if self.container else str(self.number)


def place_of(name: str) -> Place:
    """Find a tensor's block by the first number in its name.

    Lists of stages are followed to the blocks they hold: where a number is followed by another
    one ("blocks.2.1.conv.weight") or by a list called blocks or layers ("stages.0.layers.1...",
    ConvNeXt, ResNet, Swin). Deeper numbers, as of the parts of one block, are left in `rest`.
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return Place("", None, name)
    while at + 2 < len(parts):
        if parts[at + 1].isdigit():
            at += 1
        elif parts[at + 1] in _INNER_LISTS and parts[at + 2].isdigit():
            at += 2
        else:
            break
    return Place(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def block_positions(names: Iterable[str]) -> dict[str, float | None]:
    """How deep each tensor's block is: 0 for the first of its list, 1 for the last; None outside.

    The blocks of stages ("stages.0.layers.1") count on from stage to stage; other lists, as an
    encoder's and a decoder's, are counted apart.

    Args:
        names: the tensors of a model; blocks that none of them is in do not count.
    """
    places = {name: place_of(name) for name in names}
    lists: dict[str, set[tuple[int, ...]]] = {}
    for place in places.values():
        if place.number is not None:
            lists.setdefault(_list_of(place), set()).add(_numbers(place))
    ordered = {label: sorted(blocks) for label, blocks in lists.items()}

    def position(place: Place) -> float | None:
        if place.number is None:
            return None
        blocks = ordered[_list_of(place)]
        return relative_position(blocks.index(_numbers(place)), len(blocks))

    return {name: position(place) for name, place in places.items()}


def relative_position(layer: int, count: int) -> float:
    """Where a layer is among `count`: from 0 to 1; 1 for a single one, as in mergekit."""
    return layer / (count - 1) if count > 1 else 1.0


def precedes_blocks(name: str) -> bool:
    """Whether a tensor outside the blocks comes before them, as embeddings do; norms and heads
    not."""
    lower = name.lower()
    return any(p in lower for p in _INPUT_PARTS) and not any(p in lower for p in _OUTPUT_PARTS)


def _list_of(place: Place) -> str:
    """The list of blocks, with the numbers of stages left open."""
    return ".".join("#" if part.isdigit() else part for part in place.container.split("."))


def _numbers(place: Place) -> tuple[int, ...]:
    stages = (int(part) for part in place.container.split(".") if part.isdigit())
    return (*stages, place.number)
