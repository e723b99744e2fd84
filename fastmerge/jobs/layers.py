"""Which tensors belong to which layer, told from their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..blocks import relative_position

_NUMBERED = re.compile(r"^(?P<stack>(?:[^.]*[^.\d][^.]*\.)*?)(?P<index>\d+)\.(?P<rest>.+)$")
# Where configurations of text, vision, audio and encoder-decoder models keep their layer count.
COUNT_KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers", "depth",
)  # fmt: skip


@dataclass(frozen=True)
class Stacks:
    """The layer stacks of a model.

    Attributes:
        sizes: {prefix of the names, with the trailing dot: number of layers}.
    """

    sizes: Mapping[str, int]

    def locate(self, name: str) -> tuple[str, int, str] | None:
        """(stack, layer, rest of the name), None for tensors outside the layers."""
        found = _split(name)
        return found if found is not None and found[0] in self.sizes else None

    def position(self, name: str) -> float:
        """Where a tensor's layer is: 0 for the first, 1 for the last, 0 outside the layers."""
        found = self.locate(name)
        if found is None:
            return 0.0
        return relative_position(found[1], self.sizes[found[0]])


def find_stacks(names: Iterable[str], config: Mapping[str, Any]) -> Stacks:
    """The layer stacks among tensor names such as `model.layers.3.mlp.weight` or `h.3.attn.bias`.

    A stack is a prefix followed by numbers 0, 1, ... without a gap. Those with as many layers as
    config.json counts are the model's layers; where none has, the longest.

    Args:
        names: all tensor names.
        config: config.json, empty if there is none.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        found = _split(name)
        if found is not None:
            numbers.setdefault(found[0], set()).add(found[1])
    sizes = {stack: len(s) for stack, s in numbers.items() if s == set(range(len(s)))}
    counted = set(layer_counts(config).values())
    chosen = {stack: size for stack, size in sizes.items() if size in counted}
    if not chosen and sizes:
        longest = max(sizes.values())
        chosen = {stack: size for stack, size in sizes.items() if size == longest}
    return Stacks(chosen)


def layer_counts(config: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """{path of keys: number} of every layer count in config.json, nested ones included."""
    counts: dict[tuple[str, ...], int] = {}
    for key, value in config.items():
        if key in COUNT_KEYS and isinstance(value, int) and not isinstance(value, bool):
            counts[key,] = value
        elif isinstance(value, dict) and key.endswith("_config"):
            counts |= {(key, *path): n for path, n in layer_counts(value).items()}
    return counts


def _split(name: str) -> tuple[str, int, str] | None:
    match = _NUMBERED.match(name)
    if match is None or len(match["index"]) > 6:
        return None
    return match["stack"], int(match["index"]), match["rest"]
