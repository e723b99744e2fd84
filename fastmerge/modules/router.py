"""Routers of WEMoE: from an MLP's input to how much of each expert that MLP takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "fastmerge-routers-1"

SIGMA = 0.01  # standard deviation of the initial weights; the paper says variance, its code this

DEPTHS = (0, 1, 2)


class Router(nn.Module):
    """w = mean over tokens of g(h): one coefficient per expert and sample, unbounded.

    Depth 2: g(h) = W2 relu(W1 h + b1) + b2, with W1 [d, d]; depth 1: g(h) = W2 h + b2; depth 0:
    g(h) = b2, whatever h. The weights start at N(0, 0.01^2), b1 at 0 and b2 at the coefficients of
    task arithmetic. As the last layer is linear, the mean is taken before it.

    Args:
        width: d.
        experts: K.
        depth: 0, 1 or 2 layers.
        init: what b2 starts at, one value.
        generator: source of the initial weights.
        dtype, device: of the parameters.

    Raises:
        ValueError: another depth.

    Source: WEMoE (arXiv 2402.00433).
    """

    def __init__(
        self,
        width: int,
        experts: int,
        depth: int = 2,
        init: float = 0.3,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"gate depth must be 0, 1 or 2, got {depth!r}")
        self.width, self.experts, self.depth = width, experts, depth
        made = {"dtype": dtype, "device": device}
        if depth == 2:
            self.hidden = nn.Linear(width, width, **made)
            nn.init.zeros_(self.hidden.bias)
            _draw(self.hidden.weight, generator)
        if depth > 0:
            self.weight = nn.Parameter(torch.empty(experts, width, **made))  # W2
            _draw(self.weight, generator)
        self.bias = nn.Parameter(torch.full((experts,), float(init), **made))  # b2

    def forward(self, x: Tensor) -> Tensor:
        """Coefficients [B, K] of inputs [B, .., d] with any token dimensions; [K] at depth 0.

        The hidden layer runs in the dtype of x or of autocast, the rest in the parameters'.
        """
        if self.depth == 0:
            return self.bias
        if self.depth == 2:
            weight, bias = self.hidden.weight, self.hidden.bias
            x = F.relu(F.linear(x, weight.to(x.dtype), bias.to(x.dtype)))
        mean = x.to(self.weight.dtype)
        if mean.dim() > 2:
            mean = mean.flatten(1, -2).mean(1)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(mean, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"width={self.width}, experts={self.experts}, depth={self.depth}"


def _draw(weight: Tensor, generator: torch.Generator | None) -> None:
    """N(0, SIGMA^2), the same values on every device and in every dtype."""
    values = torch.randn(weight.shape, generator=generator) * SIGMA
    with torch.no_grad():
        weight.copy_(values)


class Routers(nn.ModuleList):
    """The routers of a model, one per MLP; what `fastmerge.learn` learns.

    Args:
        names: names of the modules the routers are in front of.
        experts: the K tasks' names, in the order of the coefficients.
        widths: features of each module's input.
        depth, init, dtype, device: as for `Router`.
        seed: seed of the initial weights.

    Attributes:
        names, experts, depth: the same.
        shapes: [width] of each.
        parametrization: "gate depth 2", what a checkpoint of learning must agree on.
    """

    def __init__(
        self,
        names: Sequence[str],
        experts: Sequence[str],
        widths: Sequence[int],
        *,
        depth: int = 2,
        init: float = 0.3,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        generator = torch.Generator().manual_seed(seed)
        made = {"depth": depth, "init": init, "dtype": dtype, "device": device}
        super().__init__(Router(d, len(experts), generator=generator, **made) for d in widths)
        self.names, self.experts, self.depth = list(names), list(experts), depth
        self.shapes = [[width] for width in widths]
        self.parametrization = f"gate depth {depth}"

    def save(self, path: str | Path) -> None:
        """Write all routers and what they belong to as one safetensors file."""
        metadata = {"format": FORMAT} | {k: json.dumps(v) for k, v in self._about().items()}
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)

    def load(self, path: str | Path) -> Routers:
        """Take the values of a file that was saved for the same MLPs, tasks and gate depth.

        Raises:
            ValueError: the file belongs to other tasks, another depth or another model, or is none.
            FileNotFoundError: no file there.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no file of routers")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path}: not a file of routers (format {FORMAT})")
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            found = {key: json.loads(metadata[key]) for key in self._about()}
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path}: not a valid file of routers: {error}") from error
        for what, expected in self._about().items():
            if found[what] != expected:
                raise ValueError(f"{path}: routers for {what} {found[what]}, expected {expected}")
        self.take(tensors, str(path))
        return self

    def take(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy values into the parameters.

        Raises:
            ValueError: names or shapes differ from the parameters', or values are NaN or Inf.
        """
        parameters = dict(self.named_parameters())
        wrong = sorted(set(parameters) ^ set(tensors))
        if wrong:
            raise ValueError(f"{source}: router tensor {wrong[0]!r} is missing or unknown")
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"{source}: router tensor {name!r} has shape {list(tensors[name].shape)}, "
                    f"expected {list(parameter.shape)}"
                )
            if not torch.isfinite(tensors[name]).all():
                raise ValueError(f"{source}: router tensor {name!r} contains NaN or Inf")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def _about(self) -> dict[str, object]:
        widths = [width for (width,) in self.shapes]
        return {"tasks": self.experts, "gate depth": self.depth, "MLPs": self.names} | {
            "widths": widths
        }
