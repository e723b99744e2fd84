"""`MergedWeight`: a parameter that stands for base + sum_k lambda_k tau_k and is computed with."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .coefficients import Coefficients
from .deltas import Deltas

_HANDLERS: dict[Callable, Callable] = {}


class MergedWeight(torch.Tensor):
    """A weight W = base + sum_k lambda_k tau_k that modules hold as an ordinary parameter.

    Linear layers (`F.linear`, `torch.addmm`), embeddings and patch convolutions compute with it
    without building it; every other function gets a combined copy of this one tensor, with its
    gradient with respect to the coefficients. In-place changes are refused.

    Attributes:
        base: [*], the base model's tensor.
        deltas: K deltas [*] in a storage format.
        coefficients: the module that holds lambda.
        index: which of the coefficients' L tensors this is.
        uses: how often it was computed with, by "merged_linear", "patches", "rows" or "built".
    """

    base: Tensor
    deltas: Deltas
    coefficients: Coefficients
    index: int
    uses: Counter

    @staticmethod
    def __new__(cls, base: Tensor, deltas: Deltas, coefficients: Coefficients, index: int):
        weight = torch.Tensor._make_wrapper_subclass(
            cls, base.shape, dtype=base.dtype, device=base.device, requires_grad=False
        )
        weight._is_param = True  # what nn.Module looks for in a Parameter subclass
        return weight

    def __init__(self, base: Tensor, deltas: Deltas, coefficients: Coefficients, index: int):
        self.base, self.deltas = base, deltas
        self.coefficients, self.index = coefficients, index
        self.uses = Counter()

    @property
    def name(self) -> str:
        """Name of the tensor in the model it was attached to."""
        return self.coefficients.names[self.index]

    def row(self) -> Tensor:
        """Its coefficients: [K], differentiable."""
        return self.coefficients.row(self.index)

    def combined(self) -> Tensor:
        """A built copy of the whole weight, differentiable with respect to the coefficients."""
        self.uses["built"] += 1
        return ops.weighted_sum(self.base, self.deltas, self.row())

    def __repr__(self) -> str:
        return (
            f"MergedWeight({self.name!r}, shape={list(self.shape)}, dtype={self.dtype}, "
            f"experts={len(self.deltas)})"
        )

    def __deepcopy__(self, memo: dict) -> MergedWeight:
        # base and deltas are never written to, so copies share them
        coefficients = copy.deepcopy(self.coefficients, memo)
        clone = MergedWeight(self.base, self.deltas, coefficients, self.index)
        memo[id(self)] = clone
        return clone

    def __reduce_ex__(self, protocol):
        raise TypeError(
            f"merged weight {self.name!r} cannot be pickled; save model.state_dict() (merged "
            "values) or coefficients.save(path), or call fastmerge.materialize(model) first"
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        _refuse_mutation(func, args, kwargs)
        return func(*_build(args), **_build(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        weights = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_merged(a)]
        raise NotImplementedError(
            f"{func} reached merged weight {weights[0].name!r} past fastmerge's handling, where "
            "its coefficients would lose their gradient; call fastmerge.materialize(model) first"
        )


def _is_merged(value: object) -> bool:
    return type(value) is MergedWeight


def _build(value):
    """`value` with every MergedWeight in it replaced by a combined copy."""
    if _is_merged(value):
        return value.combined()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_build(v) for v in value)
    if type(value) is dict:
        return {k: _build(v) for k, v in value.items()}
    return value


def _refuse_mutation(func, args, kwargs) -> None:
    """Raise if `func` would write to a merged weight, which a combined copy would hide."""
    name = getattr(func, "__name__", str(func))
    is_setter = name == "__set__" or name == "__setitem__"
    in_place = name.endswith("_") and not name.endswith("__")
    in_place_operator = name.startswith("__i") and name not in ("__invert__", "__index__")
    target = args[0] if args and (is_setter or in_place or in_place_operator) else None
    targets = [target, *_as_tuple(kwargs.get("out"))]
    for written in targets:
        if _is_merged(written):
            raise RuntimeError(
                f"{name} would change merged weight {written.name!r} in place: its value follows "
                "from base, experts and coefficients. Change those, call "
                "fastmerge.materialize(model) for ordinary weights, or move and convert the "
                "model before fastmerge.attach"
            )


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _implements(*functions: Callable) -> Callable:
    def decorator(handler: Callable) -> Callable:
        for function in functions:
            _HANDLERS[function] = handler
        return handler

    return decorator


def _autocast(x: Tensor, weight: MergedWeight) -> Tensor:
    """x in the dtype a linear layer would compute in, under autocast or not."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    if x.dtype != weight.dtype:
        raise RuntimeError(
            f"input of merged weight {weight.name!r} is {x.dtype}, expected {weight.dtype}"
        )
    return x


@_implements(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_merged(weight) or weight.dim() != 2 or _is_merged(input):
        return NotImplemented
    weight.uses["merged_linear"] += 1
    return ops.merged_linear(
        _autocast(input, weight), weight.base, weight.deltas, weight.row(), _build(bias)
    )


@_implements(torch.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta=1, alpha=1, out=None) -> Tensor:
    if not _is_merged(mat2) or _is_merged(mat1) or beta != 1 or alpha != 1 or out is not None:
        return NotImplemented
    if input.dim() != 1:
        return NotImplemented
    mat2.uses["merged_linear"] += 1
    return ops.merged_linear(
        _autocast(mat1, mat2), mat2.base, mat2.deltas, mat2.row(), _build(input), transpose=True
    )


@_implements(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Combine only the rows that are looked up, or the whole table if that is smaller."""
    if not _is_merged(weight) or input.numel() >= weight.shape[0]:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotImplementedError(
            f"merged embedding {weight.name!r}: max_norm, scale_grad_by_freq and sparse are not "
            "supported"
        )
    weight.uses["rows"] += 1
    ids = input.reshape(-1)

    def gather(table: Tensor) -> Tensor:
        return table.index_select(0, ids)  # [R, D]

    rows = ops.weighted_sum(gather(weight.base), weight.deltas.map(gather), weight.row())
    if padding_idx is not None:
        padding = padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx
        rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
    return rows.view(*input.shape, weight.shape[1])


def _patch_convolution(
    input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    """Convolution with stride = kernel size as a merged linear layer on unfolded patches."""
    if not _is_merged(weight) or _is_merged(input):
        return NotImplemented
    kernel = list(weight.shape[2:])
    spatial = len(kernel)
    expanded = [list(v) if isinstance(v, (tuple, list)) else [v] * spatial for v in (stride,)]
    no_padding = padding == "valid" or all(p == 0 for p in _as_tuple(padding))
    undilated = all(d == 1 for d in _as_tuple(dilation)) or math.prod(kernel) == 1
    batched = input.dim() == spatial + 2
    if expanded[0] != kernel or not (no_padding and undilated and batched) or groups != 1:
        return NotImplemented
    counts = [size // k for size, k in zip(input.shape[2:], kernel, strict=True)]
    cropped = input
    for axis, (count, k) in enumerate(zip(counts, kernel, strict=True)):
        cropped = cropped.narrow(axis + 2, 0, count * k)
    split = [n for pair in zip(counts, kernel, strict=True) for n in pair]
    patches = cropped.reshape(*input.shape[:2], *split)  # [B, C, n1, k1, n2, k2, ...]
    outer = [2 + 2 * i for i in range(spatial)]
    inner = [3 + 2 * i for i in range(spatial)]
    patches = patches.permute(0, *outer, 1, *inner).flatten(1 + spatial)  # [B, n1, .., C*k1*..]
    weight.uses["patches"] += 1
    y = ops.merged_linear(
        _autocast(patches, weight),
        weight.base.flatten(1),
        weight.deltas.map(lambda t: t.flatten(1)),
        weight.row(),
        _build(bias),
    )  # [B, n1, .., O]
    return y.movedim(-1, 1)


_implements(F.conv1d, F.conv2d, F.conv3d)(_patch_convolution)


@_implements(torch.Tensor.requires_grad_)
def _requires_grad_(weight: Tensor, requires_grad: bool = True) -> Tensor:
    if requires_grad:
        raise RuntimeError(
            f"merged weight {weight.name!r} cannot require grad: its coefficients do. Optimize "
            "coefficients.parameters()"
        )
    return weight


def _metadata_functions() -> frozenset:
    """Functions that only look at shape, dtype, device or flags: they need no combined copy."""
    tensor = torch.Tensor
    properties = (
        "shape dtype device ndim layout is_leaf requires_grad grad grad_fn itemsize nbytes "
        "is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested is_mkldnn "
        "_version output_nr retains_grad _backward_hooks"
    )
    methods = (
        "size dim ndimension numel nelement element_size stride storage_offset is_contiguous "
        "is_floating_point is_complex is_signed get_device __len__ __hash__ is_inference"
    )
    functions = {getattr(tensor, name).__get__ for name in properties.split()}
    functions |= {getattr(tensor, name) for name in methods.split()}
    functions |= {torch.numel, torch.is_floating_point, torch.is_complex}
    return frozenset(functions)


_METADATA = _metadata_functions()
