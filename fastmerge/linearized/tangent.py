"""`LinearizedModule`: any module replaced by its tangent in some of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from ..attachment import check_ordinary
from ..checking import Patterns, select_names
from .adapters import check_state


class LinearizedModule(nn.Module):
    """A module's first-order expansion: f(x; phi0) + d/dphi f(x; phi0) . delta, delta = phi - phi0.

    Its output is affine in delta whatever the module does: a transformer block with LoRAs in it, or
    a whole model. Task vectors are values of `state()`; those of several tasks merge linearly in
    their coefficients at the module's output. A forward pass computes value and tangent at once
    (forward-mode differentiation), for about three times the cost; a single linear layer with a
    LoRA has the cheaper closed form of `linearize`.

    Args:
        module: the module, whose own parameters stay phi0 and are frozen. It takes the place of
            the module in a model: `model.layers[3] = LinearizedModule(model.layers[3], "*.up")`.
        include, exclude: which parameters phi are, glob patterns or a function of the name; all
            floating-point ones by default.

    Attributes:
        deltas: the trained delta, one for each of `names`, 0 at the start.

    Raises:
        ValueError: no parameter is selected, or the module has merged weights.

    Source: L-LoRA (arXiv 2310.04742); of whole models: Ortiz-Jimenez et al. (arXiv 2305.12827).
    """

    def __init__(self, module: nn.Module, include: Patterns = None, exclude: Patterns = None):
        super().__init__()
        check_ordinary(module)
        parameters = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
        self.names = select_names(list(parameters), include, exclude)
        self.module = module.requires_grad_(False)
        self.deltas = nn.ParameterList(torch.zeros_like(parameters[name]) for name in self.names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, with the tangent added to every floating-point tensor in it."""
        start = {name: self.module.get_parameter(name) for name in self.names}
        tangents = dict(zip(self.names, self.deltas, strict=True))
        made: list[tuple[list[Any], pytree.TreeSpec]] = []

        def moving(parameters: dict[str, Tensor]) -> list[Tensor]:
            """The floating-point tensors of the output; all of it goes to `made`."""
            leaves, spec = pytree.tree_flatten(
                functional_call(self.module, parameters, args, kwargs)
            )
            made.append((leaves, spec))
            return [leaf for leaf in leaves if _moves(leaf)]

        # Fused attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            values, moves = jvp(moving, (start,), (tangents,))
        (leaves, spec), sums = made[0], iter(v + m for v, m in zip(values, moves, strict=True))
        return pytree.tree_unflatten([next(sums) if _moves(x) else x for x in leaves], spec)

    def state(self) -> dict[str, Tensor]:
        """Copies of delta by parameter name: the task vector."""
        return {n: d.detach().clone() for n, d in zip(self.names, self.deltas, strict=True)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take deltas like those of `state`, for example merged ones.

        Raises:
            ValueError: names or shapes differ; nothing is changed then.
        """
        own = dict(zip(self.names, self.deltas, strict=True))
        check_state(own, state)
        for name, delta in own.items():
            delta.copy_(state[name])


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
