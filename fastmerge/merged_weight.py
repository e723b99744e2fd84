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

    def count(self, how: str) -> None:
        """Note one computation for the coverage report; compiled graphs leave it out."""
        if not torch.compiler.is_compiling():
            self.uses[how] += 1

    def combined(self) -> Tensor:
        """A built copy of the whole weight, differentiable with respect to the coefficients."""
        self.count("built")
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
    targets = args[:1] if func in _MUTATING else ()
    if kwargs.get("out") is not None:
        targets = (*targets, *_as_tuple(kwargs["out"]))
    for written in targets:
        if _is_merged(written):
            raise RuntimeError(
                f"{func} would change merged weight {written.name!r} in place: its value follows "
                "from base, experts and coefficients. Change those, call "
                "fastmerge.materialize(model) for ordinary weights, or move and convert the "
                "model before fastmerge.attach"
            )


def _refuse_storage(weight: MergedWeight, name: str) -> None:
    raise RuntimeError(
        f"{name}: merged weight {weight.name!r} has no memory of its own; use "
        "model.state_dict() or fastmerge.materialize(model) for ordinary tensors"
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
    if x.dtype != weight.base.dtype:
        raise RuntimeError(
            f"input of merged weight {weight.name!r} is {x.dtype}, expected {weight.base.dtype}"
        )
    return x


@_implements(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_merged(weight) or weight.base.dim() != 2 or _is_merged(input):
        return NotImplemented
    weight.count("merged_linear")
    return ops.merged_linear(
        _autocast(input, weight), weight.base, weight.deltas, weight.row(), _build(bias)
    )


@_implements(torch.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta=1, alpha=1, out=None) -> Tensor:
    if not _is_merged(mat2) or _is_merged(mat1) or beta != 1 or alpha != 1 or out is not None:
        return NotImplemented
    if input.dim() != 1:
        return NotImplemented
    mat2.count("merged_linear")
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
    if not _is_merged(weight) or input.numel() >= weight.base.shape[0]:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotImplementedError(
            f"merged embedding {weight.name!r}: max_norm, scale_grad_by_freq and sparse are not "
            "supported"
        )
    weight.count("rows")
    ids = input.reshape(-1)

    def gather(table: Tensor) -> Tensor:
        return table.index_select(0, ids)  # [R, D]

    rows = ops.weighted_sum(gather(weight.base), weight.deltas.map(gather), weight.row())
    if padding_idx is not None:
        padding = padding_idx if padding_idx >= 0 else weight.base.shape[0] + padding_idx
        rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
    return rows.view(*input.shape, weight.base.shape[1])


def _patch_convolution(
    input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    """Convolution with stride = kernel size as a merged linear layer on unfolded patches."""
    if not _is_merged(weight) or _is_merged(input):
        return NotImplemented
    kernel = list(weight.base.shape[2:])
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
    weight.count("patches")
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


def _mutating_functions() -> frozenset:
    """Functions that write to their first argument: in-place methods, operators and setters."""
    functions = set()
    for overridable in torch.overrides.get_overridable_functions().values():
        for function in overridable:
            name = getattr(function, "__name__", "")
            in_place = name.endswith("_") and not name.endswith("__")
            operator = name.startswith("__i") and name not in (
                "__init__",
                "__invert__",
                "__index__",
            )
            if in_place or operator or name in ("__setitem__", "__set__"):
                functions.add(function)
    for name in dir(torch.Tensor):
        attribute = getattr(torch.Tensor, name)
        if hasattr(attribute, "__set__") and not isinstance(attribute, property):
            functions.add(attribute.__set__)
    return frozenset(functions)


_METADATA = _metadata_functions()
_MUTATING = _mutating_functions()
_STORAGE = ("data_ptr", "storage", "untyped_storage", "register_hook", "retain_grad")


def _define_methods() -> None:
    """Tensor methods and operators as Python methods of MergedWeight.

    They do what `__torch_function__` would; as Python functions, torch.compile can follow them.
    """
    looks = {f.__name__ for f in _METADATA if getattr(torch.Tensor, f.__name__, None) is f}
    writes = {f.__name__ for f in _MUTATING}

    def method(name: str) -> Callable:
        if name in _STORAGE:
            return lambda self, *args, **kwargs: _refuse_storage(self, name)
        if name in looks:
            return lambda self, *args, **kwargs: getattr(self.base, name)(*args, **kwargs)
        return lambda self, *args, **kwargs: getattr(self.combined(), name)(
            *_build(args), **_build(kwargs)
        )

    operators = "add sub mul truediv floordiv mod pow matmul and or xor".split()
    dunder = {f"__{prefix}{o}__" for o in operators for prefix in ("", "r")}
    dunder |= {"__neg__", "__abs__", "__getitem__", "__eq__", "__ne__"}
    for name in dir(torch.Tensor):
        public = not name.startswith("_") and callable(getattr(torch.Tensor, name))
        if (public or name in dunder) and name not in writes and name not in vars(MergedWeight):
            if not isinstance(getattr(torch.Tensor, name), type):
                setattr(MergedWeight, name, method(name))


_define_methods()
