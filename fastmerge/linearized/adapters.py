"""`linearize`: a model's linear layers get linearised LoRAs, or PEFT's LoRAs become linearised."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attachment import check_unattached
from ..checkpoint.lora import PREFIX
from .files import Factors, read_adapter, read_start, write_adapter
from .layers import NAME, LinearizedLora, add_change, draw_start

Targets = str | Sequence[str] | Callable[[str], bool]


@dataclass
class _Layer:
    """A linearised layer.

    Attributes:
        start_down, start_up: A0 [r, I] and B0 [O, r] or None.
        up, down: dB [O, r] and dA [r, I] or None, parameters.
        scaling: s.
        transposed: whether the adapted weight is stored as [I, O].
        remove: takes the adapter, or what linearised it, away.
    """

    start_down: Tensor
    start_up: Tensor | None
    up: nn.Parameter
    down: nn.Parameter | None
    scaling: float
    transposed: bool
    remove: Callable[[], None]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"up": self.up} if self.down is None else {"up": self.up, "down": self.down}

    def factors(self) -> Factors:
        """The task vector s (dB A0 + B0 dA) as one product."""
        if self.down is None:
            return Factors(self.start_down, self.up.detach(), self.scaling, self.transposed)
        down = torch.cat([self.start_down, self.down.detach()])
        up = torch.cat([self.up.detach(), self.start_up], 1)
        return Factors(down, up, self.scaling, self.transposed)

    def take(self, factors: Factors, name: str, source: str) -> dict[str, Tensor]:
        """{parameter: value} of factors that have this layer's start."""
        mine = self.factors()
        rank = len(self.start_down)
        same = factors.scaling == mine.scaling and factors.transposed == mine.transposed
        shapes = (factors.down.shape, factors.up.shape)
        if shapes != (mine.down.shape, mine.up.shape) or not same:
            raise ValueError(
                f"{source}: {name!r} has factors {[list(s) for s in shapes]} and scaling "
                f"{factors.scaling:g}, expected {list(mine.down.shape)}, {list(mine.up.shape)} and "
                f"{mine.scaling:g}"
            )
        starts = [(factors.down[:rank], self.start_down)]
        if self.start_up is not None:
            starts.append((factors.up[:, rank:], self.start_up))
        for found, expected in starts:
            if not torch.equal(found.to(expected), expected):
                raise ValueError(
                    f"{source}: {name!r} was trained from another start (A0 or B0 differ: another "
                    "seed?), expected this model's"
                )
        values = {"up": factors.up[:, :rank]}
        return values if self.down is None else values | {"down": factors.down[rank:]}


class Linearized:
    """The linearised adapters of a model, as `linearize` gives them.

    Attributes:
        model: the model.
        layers: {module name: its adapter}.
    """

    def __init__(self, model: nn.Module, layers: dict[str, _Layer], trained: set[int]):
        self.model, self.layers, self._trained = model, layers, trained

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is to be trained: dB of every layer, and dA where B0 is not 0."""
        for layer in self.layers.values():
            yield from layer.parameters().values()

    def state(self) -> dict[str, Tensor]:
        """Copies of the parameters, all 0 at the start: the task vector of L-LoRA's paper."""
        return {name: parameter.detach().clone() for name, parameter in self._named().items()}

    def _named(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{kind}": parameter
            for name, layer in self.layers.items()
            for kind, parameter in layer.parameters().items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take parameters like those of `state`, for example merged ones.

        Raises:
            ValueError: names or shapes differ; nothing is changed then.
        """
        own = self._named()
        check_state(own, state)
        for name, parameter in own.items():
            parameter.copy_(state[name])

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start, for the next task."""
        for parameter in self.parameters():
            parameter.zero_()
            parameter.grad = None

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the task vector as a LoRA in PEFT's format: an expert for `attach` and `merge`.

        Where B0 = 0 its factors are A0 and dB. Otherwise it belongs on the base model with the
        starting adapter merged into it, and has twice the rank: [A0; dA] and [dB, B0].

        Args:
            folder: a new or empty folder.
            overwrite: replace an earlier one.

        Raises:
            FileExistsError: something is there already.
            ValueError: a layer is still at its start (its module was never called, or not trained)
                or has NaN or Inf.
        """
        for name, layer in self.layers.items():
            for kind, parameter in layer.parameters().items():
                if not bool(torch.isfinite(parameter).all()):
                    raise ValueError(f"the adapter of {name!r} has NaN or Inf in {kind}")
            if not any(bool(p.any()) for p in layer.parameters().values()):
                raise ValueError(
                    f"the adapter of {name!r} is still at its start: was it trained, and does the "
                    "model call the module instead of reading its weight?"
                )
        factors = {name: layer.factors() for name, layer in self.layers.items()}
        return write_adapter(Path(folder), factors, overwrite)

    @torch.no_grad()
    def load(self, folder: str | Path) -> Linearized:
        """Take what `save` wrote from the same start, to use or train it on.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError: not a folder of `save`, such as a LoRA that PEFT trained.
            ValueError: other layers, ranks or another start; nothing is changed then.
        """
        found = read_adapter(Path(folder))
        for name in sorted(found.keys() ^ self.layers.keys()):
            raise ValueError(
                f"{folder}: {'no adapter for' if name in self.layers else 'has an adapter for'} "
                f"{name!r}, expected one for each of {len(self.layers)} layers and no other"
            )
        values = {
            name: layer.take(found[name], name, str(folder)) for name, layer in self.layers.items()
        }
        for name, layer in self.layers.items():
            for kind, parameter in layer.parameters().items():
                parameter.copy_(values[name][kind])
        return self

    def remove(self) -> nn.Module:
        """The model as it was before `linearize`; PEFT's LoRAs stay, no longer linearised."""
        for layer in self.layers.values():
            layer.remove()
        for parameter in self.model.parameters():
            if id(parameter) in self._trained:
                parameter.requires_grad_(True)
        return self.model


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first difference, unless both have the same tensors."""
    for name in sorted(own.keys() ^ state.keys()):
        raise ValueError(f"state {'misses' if name in own else 'has the unknown'} {name!r}")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            found, expected = list(state[name].shape), list(tensor.shape)
            raise ValueError(f"state: {name!r} is {found}, expected {expected}")


def linearize(
    model: nn.Module,
    targets: Targets | None = None,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    seed: int = 42,
    start: str | PathLike | None = None,
) -> Linearized:
    """Give linear layers LoRAs that are linear in their parameters, in place.

    y = x W^T + b + s (B0 A0 + dB A0 + B0 dA) x, s = alpha / rank, the tangent of LoRA at its start.
    B0 = 0 unless `start` is given, so that one thin product remains, A0 is fixed, and merging such
    adapters is exactly linear in their coefficients. All other parameters are frozen. Without
    `targets` and `start` the model's own LoRAs, which PEFT put there, are linearised: A is a fixed
    tensor from then on, nothing else changes, and PEFT saves, merges and loads as before.

    Args:
        model: any module; its layers are `nn.Linear` or transformers' `Conv1D`.
        targets: names of modules, or their ends, as glob patterns, or a function of the name.
        rank, alpha: of the adapters.
        dropout: probability of dropping an entry of x on the way to A0, while training.
        seed: of A0, the same in all models that are linearised with it.
        start: a LoRA in PEFT's format to start from; targets and sizes are its own.

    Returns:
        The adapters: their `parameters()` are what an optimizer takes, `save` writes an expert.

    Raises:
        ValueError: a pattern matches no linear layer, a layer would not notice (inside
            `nn.MultiheadAttention`) or cannot be linearised; the model is unchanged then.
        CheckpointError: `start` is no LoRA of this model.

    Source: L-LoRA (arXiv 2310.04742): rank 16, alpha 32, attention's query and value, seed 42. Its
    code linearises nothing, silently, with peft above 0.4.
    """
    check_unattached(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if start is not None:
        if targets is not None:
            raise ValueError("start has targets of its own: give either targets or start")
        starts = read_start(model, start)
    elif targets is not None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        starts = {
            name: Factors(
                draw_start(seed, name, rank, _sizes(layer)[0], layer.weight), None, alpha / rank
            )
            for name, layer in _targets(model, targets).items()
        }
    else:
        layers = _peft_layers(model)
        return Linearized(model, {n: make() for n, make in layers.items()}, trained)
    for name in starts:
        _check_layer(model, name)
    model.requires_grad_(False)
    layers = {
        name: _adapted(model.get_submodule(name), factors, dropout)
        for name, factors in starts.items()
    }
    return Linearized(model, layers, trained)


def _adapted(layer: nn.Module, start: Factors, dropout: float) -> _Layer:
    _, outputs, transposed = _sizes(layer)
    adapter = LinearizedLora(start.down, start.scaling, outputs, start.up, dropout)
    layer.register_module(NAME, adapter.train(layer.training))
    hook = layer.register_forward_hook(add_change)

    def remove() -> None:
        hook.remove()
        delattr(layer, NAME)

    return _Layer(
        adapter.start_down, adapter.start_up, adapter.up, adapter.down, start.scaling, transposed,
        remove,
    )  # fmt: skip


def _sizes(layer: nn.Module) -> tuple[int, int, bool]:
    """I, O and whether the weight is stored as [I, O]."""
    transposed = not isinstance(layer, nn.Linear)
    rows, columns = layer.weight.shape
    return (rows, columns, True) if transposed else (columns, rows, False)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _targets(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The linear layers that every pattern, and some, matches."""
    modules = {name: module for name, module in model.named_modules() if name}
    if callable(targets):
        chosen = [name for name in modules if targets(name) and _is_linear(modules[name])]
    else:
        chosen = []
        for pattern in (targets,) if isinstance(targets, str) else targets:
            found = [
                n for n in modules if any(fnmatchcase(n, p) for p in (pattern, f"*.{pattern}"))
            ]
            linear = [n for n in found if _is_linear(modules[n])]
            if not linear:
                what = f"; {found[0]!r} is a {type(modules[found[0]]).__name__}" if found else ""
                raise ValueError(f"targets: no linear layer matches {pattern!r}{what}")
            chosen += linear
    if not chosen:
        raise ValueError("targets: no linear layer is selected")
    return {name: modules[name] for name in modules if name in set(chosen)}


def _check_layer(model: nn.Module, name: str) -> None:
    parent, _, _ = name.rpartition(".")
    layer = model.get_submodule(name)
    if not _is_linear(layer):
        raise ValueError(f"{name!r} is a {type(layer).__name__}, expected a linear layer")
    if isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        raise ValueError(
            f"{name!r}: nn.MultiheadAttention reads the weight without calling the layer, which "
            "would leave its adapter out; choose other targets"
        )
    if hasattr(layer, NAME):
        raise ValueError(f"{name!r} is linearised already: call remove() on its adapters first")


def _peft_layers(model: nn.Module) -> dict[str, Callable[[], _Layer]]:
    """{module name: function that linearises PEFT's LoRA there}, everything checked."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    found = {
        name: module
        for name, module in model.named_modules()
        if lora is not None and isinstance(module, lora.LoraLayer)
    }
    if not found:
        raise ValueError(
            "the model has no LoRA of PEFT's: pass targets, or start from an adapter with start"
        )
    for name, layer in found.items():
        _check_peft_layer(name, layer)
    return {
        name.removeprefix(PREFIX): lambda layer=layer: _fix_down(layer)
        for name, layer in found.items()
    }


def _check_peft_layer(name: str, layer: nn.Module) -> None:
    active = list(layer.active_adapters)
    if len(active) != 1 or layer.merged:
        state = "merged" if layer.merged else f"active {active}"
        raise ValueError(f"{name!r} has adapters {state}, expected one active and none merged")
    adapter = active[0]
    if not _is_linear(layer.get_base_layer()) or adapter not in layer.lora_A:
        raise ValueError(
            f"{name!r} is a {type(layer.get_base_layer()).__name__}, expected LoRAs on linear "
            "layers alone"
        )
    if layer.use_dora.get(adapter) or adapter in layer.lora_variant:
        raise ValueError(f"{name!r} is a variant of LoRA that is not linear in B, such as DoRA")
    if layer.lora_A[adapter].weight is None or bool(layer.lora_B[adapter].weight.any()):
        raise ValueError(
            f"{name!r}: B is not 0, so this LoRA is not at its start: save it, and pass its folder "
            "to linearize(base_model, start=...)"
        )


def _fix_down(layer: nn.Module) -> _Layer:
    """Make A a buffer, which no optimizer and none of PEFT's switches can train."""
    adapter = layer.active_adapters[0]
    down, up = layer.lora_A[adapter], layer.lora_B[adapter].weight
    trained = down._parameters.pop("weight")
    down.register_buffer("weight", trained.detach())

    def remove() -> None:
        del down._buffers["weight"]
        down.register_parameter("weight", trained)

    transposed = not isinstance(layer.get_base_layer(), nn.Linear)
    return _Layer(down.weight, None, up, None, layer.scaling[adapter], transposed, remove)
