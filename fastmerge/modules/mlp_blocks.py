"""Where a transformer's MLPs are: the linear layers of each, and the module to put a router before.

They are found by shape: in a numbered block, one or two linear layers that widen d features to h
and one that narrows h to d again. Attention and routed experts are told apart by their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

OTHERS = re.compile(
    r"attn|attention|expert|(^|_)(q|k|v|o|qkv|kv|query|key|value)(_|$)", re.IGNORECASE
)

Blocks = Sequence[str] | Mapping[str, Sequence[str]] | None


@dataclass(frozen=True)
class MlpBlock:
    """One MLP of a model.

    Attributes:
        before: name of the module whose input a router sees.
        parameters: names of the parameters that are the MLP's.
        width: features of that input.
    """

    before: str
    parameters: tuple[str, ...]
    width: int


def find_mlp_blocks(model: nn.Module, blocks: Blocks = None) -> list[MlpBlock]:
    """The MLPs of a model's transformer blocks.

    Found without names in HF's CLIP, ViT, BERT, GPT-2, Llama and T5 layouts, in timm, open_clip and
    wherever a numbered block has linear layers [h, d] (also two of them, or one [2h, d]: gated) and
    [d, h], h > d, next to each other, in a module of their own or in one module each.

    Args:
        model: the model.
        blocks: names instead: glob patterns of modules, all parameters of which are an MLP's and
            before which the router comes, or {module before which the router comes: modules whose
            parameters are the MLP's}.

    Returns:
        The MLPs in the model's order.

    Raises:
        ValueError: none is found, a name is unknown, or two MLPs share a parameter.
    """
    if blocks is None:
        found = [block for name, module in model.named_modules() for block in _of(name, module)]
        if not found:
            raise ValueError(
                f"no MLP was found in {type(model).__name__}: expected numbered blocks with linear "
                "layers [h, d] and [d, h], h > d; pass their names as blocks="
            )
    else:
        found = [_named(model, *entry) for entry in _entries(model, blocks)]
    owner: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for block in found:
        for name in block.parameters:
            first = owner.setdefault(id(parameters[name]), block.before)
            if first != block.before:
                raise ValueError(
                    f"the MLPs at {first!r} and {block.before!r} share the parameter {name!r}: "
                    "pass blocks= with one of them"
                )
    return found


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear layer or of GPT-2's Conv1D, None for anything else."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return weight.shape[0], weight.shape[1]
    if type(module).__name__ == "Conv1D":  # transformers', which this package does not import
        return weight.shape[1], weight.shape[0]
    return None


def _of(name: str, module: nn.Module) -> list[MlpBlock]:
    """The MLP whose linear layers are the module's children, or alone in children of it."""
    parts = name.split(".")
    if not any(part.isdigit() for part in parts) or any(OTHERS.search(part) for part in parts):
        return []
    linear = _linears(module)
    wide = {n: s for n, s in linear.items() if s[0] > s[1]}
    narrow = {n: s for n, s in linear.items() if s[0] < s[1]}
    if len(narrow) != 1 or len(wide) not in (1, 2):
        return []
    ((down, (width, hidden)),) = narrow.items()
    gated = (hidden, 2 * hidden) if len(wide) == 1 else (hidden,)
    if any(inputs != width or outputs not in gated for outputs, inputs in wide.values()):
        return []
    layers = {f"{name}.{layer}": module.get_submodule(layer) for layer in (*wide, down)}
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    alone = all(id(p) in owned for p in module.parameters())
    before = name if alone else next(iter(layers))
    return [MlpBlock(before, _parameters(layers), width)]


def _linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Shapes of a module's linear layers, and of those that are the only one in a child of it."""
    found: dict[str, tuple[int, int]] = {}
    for child, inner in module.named_children():
        if OTHERS.search(child):
            continue
        shapes = {
            f"{child}.{n}" if n else child: shape
            for n, m in inner.named_modules()
            if (shape := linear_shape(m)) is not None
        }
        if len(shapes) == 1:
            found |= shapes
    return found


def _parameters(layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    return tuple(
        f"{name}.{parameter}"
        for name, layer in layers.items()
        for parameter, values in layer.named_parameters()
        if values.is_floating_point()
    )


def _entries(model: nn.Module, blocks: Blocks) -> list[tuple[str, list[str]]]:
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(blocks, Mapping):
        known = set(names)
        for name in (n for before, parts in blocks.items() for n in (before, *parts)):
            if name not in known:
                raise ValueError(f"blocks: {type(model).__name__} has no module {name!r}")
        return [(before, list(parts)) for before, parts in blocks.items()]
    if isinstance(blocks, str):
        blocks = [blocks]
    for pattern in blocks:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"blocks: no module of {type(model).__name__} matches {pattern!r}")
    return [(n, [n]) for n in names if any(fnmatchcase(n, pattern) for pattern in blocks)]


def _named(model: nn.Module, before: str, parts: Sequence[str]) -> MlpBlock:
    modules = {part: model.get_submodule(part) for part in parts}
    parameters = tuple(dict.fromkeys(_parameters(modules)))
    shapes = [linear_shape(m) for module in modules.values() for m in module.modules()]
    first = next((shape for shape in shapes if shape is not None), None)
    if not parameters or first is None:
        raise ValueError(f"blocks: there is no linear layer in {list(parts)} at {before!r}")
    return MlpBlock(before, parameters, first[1])
