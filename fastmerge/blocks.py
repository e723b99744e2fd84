"""Where a tensor sits in a model, read from its name: which list of blocks, which block of it."""

from __future__ import annotations

from typing import NamedTuple

_INNER_LISTS = ("blocks", "layers")


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
