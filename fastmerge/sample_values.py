"""`SampleValues`: a small merged weight written out for every sample of a batch.

A bias, norm or position table with row coefficients has B values at once. Model code knows only
one, so functions of it alone run on each sample's (torch.vmap), and the first function that also
takes activations, whose first dimension is the batch, gives every sample its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# Functions whose tensors are broadcast against each other, laid side by side, or of one batch.
_BROADCAST = frozenset(
    "add sub rsub subtract mul multiply div divide true_divide truediv floor_divide floordiv pow "
    "maximum minimum where lerp addcmul addcdiv eq ne lt le gt ge remainder mod atan2 logaddexp "
    "logical_and logical_or and or masked_fill cat concat concatenate "
    "scaled_dot_product_attention".split()
)
# Functions that treat each entry of their input's first dimension by itself.
_BY_SAMPLE = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d group_norm batch_norm "
    "instance_norm prelu linear".split()
)
# Functions whose further tensors are indices, the same for all samples.
_INDEXED = frozenset("getitem index_select gather take take_along_dim".split())


def _names() -> dict[Callable, str]:
    """The functions above, also as methods, reflected and in-place operators, by plain name."""
    found = {}
    for name in _BROADCAST | _BY_SAMPLE | _INDEXED:
        for spelling in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__"):
            for home in (torch, F, Tensor):
                if hasattr(home, spelling):
                    found[getattr(home, spelling)] = name
    return found


_NAMES = _names()


class SampleValues:
    """V_b = f(W_b), the same function of a merged weight W for each of B samples.

    To model code it looks like one sample's tensor.

    Args:
        data: [B, *], the values.
        name: of the merged weight, for messages.
    """

    def __init__(self, data: Tensor, name: str):
        self.data, self.name = data, name

    @property
    def shape(self) -> torch.Size:
        """Shape of one sample's values."""
        return self.data.shape[1:]

    @property
    def ndim(self) -> int:
        """Dimensions of one sample's values."""
        return self.data.dim() - 1

    def dim(self) -> int:
        """Dimensions of one sample's values."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Shape of one sample's values, or one of its entries."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Number of one sample's values."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Always, as merged weights are."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        return self.data.requires_grad

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"SampleValues({self.name!r}, samples={len(self.data)}, shape={list(self.shape)})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        attribute = getattr(Tensor, name)
        if callable(attribute):
            return lambda *args, **kwargs: call(attribute, (self, *args), kwargs)
        return SampleValues(torch.vmap(lambda value: getattr(value, name))(self.data), self.name)

    def of_batch(self, rank: int | None = None) -> Tensor:
        """The values as activations [B, ..] of so many dimensions, each sample with its own; a
        number as [B] if none is asked for.

        Raises:
            RuntimeError: no dimension of the values can be that of the batch.
        """
        data, batch = self.data, self.data.shape[0]
        if rank is None and self.ndim == 0:
            return data
        shape = [1] * ((rank or self.ndim) - self.ndim) + list(self.shape)
        if not shape or shape[0] not in (1, batch):
            raise RuntimeError(
                f"merged weight {self.name!r} of shape {list(self.shape)} meets activations of "
                f"{batch} samples, whose first dimension is not {batch}"
            )
        if shape[0] == 1:
            return data.reshape(batch, *shape[1:])
        return data.diagonal(dim1=0, dim2=1).movedim(-1, 0)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def _operator(name: str) -> Callable:
    def operator(self: SampleValues, *args: Any) -> Any:
        return call(getattr(Tensor, name), (self, *args), {})

    return operator


for _name in "add sub mul truediv floordiv pow matmul".split():
    for _prefix in ("", "r"):
        setattr(SampleValues, f"__{_prefix}{_name}__", _operator(f"__{_prefix}{_name}__"))
for _name in ("__neg__", "__abs__", "__getitem__"):
    setattr(SampleValues, _name, _operator(_name))


def call(func: Callable, args: tuple, kwargs: dict) -> Any:
    """A function of torch where some of the arguments may be `SampleValues`.

    Returns:
        `SampleValues` again if no argument has the batch's dimension, else an ordinary tensor.

    Raises:
        RuntimeError: the function mixes samples, or is not known not to; names it and the tensor.
    """
    leaves, spec = tree_flatten((args, kwargs))
    values = [leaf for leaf in leaves if isinstance(leaf, SampleValues)]
    if not values:
        return func(*args, **kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    batch, name, first = len(values[0].data), _NAMES.get(func), leaves[0]
    if name in _BROADCAST:
        rank = max(leaf.dim() for leaf in (*values, *tensors))
        if any(t.dim() == rank and t.dim() and t.shape[0] == batch for t in tensors):
            leaves = [v.of_batch(rank) if isinstance(v, SampleValues) else v for v in leaves]
            args, kwargs = tree_unflatten(leaves, spec)
            return func(*args, **kwargs)
        return _alone(func, leaves, spec)
    if isinstance(first, SampleValues) and (
        name in _INDEXED or not any(t.dim() and t.shape[0] == batch for t in tensors)
    ):
        return _alone(func, leaves, spec)
    if name in _BY_SAMPLE and isinstance(first, Tensor) and first.shape[:1] == (batch,):
        if name != "batch_norm" or not (kwargs.get("training") or args[5:6] == (True,)):
            return _by_sample(func, leaves, spec)
    raise RuntimeError(
        f"{func.__name__} with merged weight {values[0].name!r} cannot be "
        f"computed with the coefficients of each of {batch} samples: give all samples of a batch "
        "the same ones"
    )


def _alone(func: Callable, leaves: list, spec: Any) -> Any:
    """The function on each sample's values; all other arguments are the same for all samples."""
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, SampleValues)]
    name = leaves[places[0]].name

    def of_one(*parts: Tensor) -> Any:
        given = list(leaves)
        for place, part in zip(places, parts, strict=True):
            given[place] = part
        args, kwargs = tree_unflatten(given, spec)
        return func(*args, **kwargs)

    result = torch.vmap(of_one)(*(leaves[place].data for place in places))
    return tree_map(lambda t: SampleValues(t, name) if isinstance(t, Tensor) else t, result)


def _by_sample(func: Callable, leaves: list, spec: Any) -> Any:
    """The function on each entry of its input's first dimension, with that sample's values."""
    whole = SampleValues(leaves[0].unsqueeze(1), "input")
    return tree_map(
        lambda v: v.data.flatten(0, 1) if isinstance(v, SampleValues) else v,
        _alone(func, [whole, *leaves[1:]], spec),
    )
