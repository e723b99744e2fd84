"""`MergedWeight`: a parameter that stands for base + sum_k lambda_k tau_k and is computed with."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .coefficients import Coefficients
from .deltas import Deltas
from .merged_functions import HANDLERS, as_tuple, build, implements, is_merged

Spans = tuple[tuple[int, int, int], ...]


class MergedWeight(torch.Tensor):
    """A weight W = base + sum_k lambda_k tau_k that modules hold as an ordinary parameter.

    Linear layers (`F.linear`, `torch.addmm`), embeddings and patch convolutions compute with it
    without building it; every other function gets a combined copy of this one tensor, with its
    gradient with respect to the coefficients. Slices of rows (`narrow`, `chunk`, `split`, `w[a:b]`)
    are merged weights too. In-place changes are refused.

    Attributes:
        base: [*], the base model's tensor.
        deltas: K deltas [*] in a storage format.
        coefficients: the module that holds lambda.
        index: which of the coefficients' L tensors this is.
        spans: (start, stop, row of the coefficients) of each chunk of its rows; one chunk, unless
            the coefficients have `chunks`.
        uses: how often it was computed with, by "merged_linear", "patches", "rows" or "built".
    """

    base: Tensor
    deltas: Deltas
    coefficients: Coefficients
    index: int
    spans: Spans
    uses: Counter
    is_merged_weight = True

    @staticmethod
    def __new__(
        cls,
        base: Tensor,
        deltas: Deltas,
        coefficients: Coefficients,
        index: int,
        spans: Spans | None = None,
    ):
        weight = torch.Tensor._make_wrapper_subclass(
            cls, base.shape, dtype=base.dtype, device=base.device, requires_grad=False
        )
        weight._is_param = True  # what nn.Module looks for in a Parameter subclass
        return weight

    def __init__(
        self,
        base: Tensor,
        deltas: Deltas,
        coefficients: Coefficients,
        index: int,
        spans: Spans | None = None,
    ):
        self.base, self.deltas = base, deltas
        self.coefficients, self.index = coefficients, index
        self.spans = coefficients.spans(index, base.shape) if spans is None else spans
        self.uses = Counter()

    @property
    def name(self) -> str:
        """Name of the tensor in the model it was attached to."""
        return self.coefficients.names[self.index]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as a merged weight; a built copy of them in a compiled graph."""
        if start == 0 and stop == self.base.shape[0]:
            return self
        if torch.compiler.is_compiling():  # which cannot make a tensor subclass out of nothing
            return self.combined()[start:stop]
        spans = tuple(
            (max(a, start) - start, min(b, stop) - start, row)
            for a, b, row in self.spans
            if max(a, start) < min(b, stop)
        )
        view = MergedWeight(
            self.base[start:stop],
            self.deltas.rows(start, stop),
            self.coefficients,
            self.index,
            spans or ((0, 0, self.spans[0][2]),),
        )
        view.uses = self.uses
        return view

    def chunks(self) -> list[tuple[int, int, Tensor, Deltas, Tensor]]:
        """(start, stop, base rows, their deltas, coefficients [K]) of each chunk of rows."""
        if len(self.spans) == 1:
            ((start, stop, row),) = self.spans
            return [(start, stop, self.base, self.deltas, self.coefficients.row(row))]
        return [
            (
                start,
                stop,
                self.base[start:stop],
                self.deltas.rows(start, stop),
                self.coefficients.row(row),
            )
            for start, stop, row in self.spans
        ]

    def count(self, how: str) -> None:
        """Note one computation for the coverage report; compiled graphs leave it out."""
        if not torch.compiler.is_compiling():
            self.uses[how] += 1

    def combined(self) -> Tensor:
        """A built copy of the whole weight, differentiable with respect to the coefficients."""
        self.count("built")
        built = [ops.weighted_sum(*rows) for _, _, *rows in self.chunks()]
        return built[0] if len(built) == 1 else torch.cat(built)

    def alias(self) -> MergedWeight:
        """Another object for the same merged weight."""
        alias = MergedWeight(self.base, self.deltas, self.coefficients, self.index, self.spans)
        alias.uses = self.uses
        return alias

    def __repr__(self) -> str:
        return (
            f"MergedWeight({self.name!r}, shape={list(self.shape)}, dtype={self.dtype}, "
            f"experts={len(self.deltas)})"
        )

    def __deepcopy__(self, memo: dict) -> MergedWeight:
        # base and deltas are never written to, so copies share them
        coefficients = copy.deepcopy(self.coefficients, memo)
        clone = MergedWeight(self.base, self.deltas, coefficients, self.index, self.spans)
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
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        _refuse_mutation(func, args, kwargs)
        return func(*build(args), **build(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        weights = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if is_merged(a)]
        raise NotImplementedError(
            f"{func} reached merged weight {weights[0].name!r} past fastmerge's handling, where "
            "its coefficients would lose their gradient; call fastmerge.materialize(model) first"
        )


def _refuse_mutation(func, args, kwargs) -> None:
    """Raise if `func` would write to a merged weight, which a combined copy would hide."""
    targets = args[:1] if func in _MUTATING else ()
    if kwargs.get("out") is not None:
        targets = (*targets, *as_tuple(kwargs["out"]))
    for written in targets:
        if is_merged(written):
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


@implements(torch.Tensor.requires_grad_)
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
        handler = HANDLERS[getattr(torch.Tensor, name)] if name in views else None

        def call(self, *args, **kwargs):
            result = NotImplemented if handler is None else handler(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
            return getattr(self.combined(), name)(*build(args), **build(kwargs))

        return call

    operators = "add sub mul truediv floordiv mod pow matmul and or xor".split()
    dunder = {f"__{prefix}{o}__" for o in operators for prefix in ("", "r")}
    dunder |= {"__neg__", "__abs__", "__getitem__", "__eq__", "__ne__"}
    views = {"narrow", "split", "chunk", "__getitem__"}
    for name in dir(torch.Tensor):
        public = not name.startswith("_") and callable(getattr(torch.Tensor, name))
        if (public or name in dunder) and name not in writes and name not in vars(MergedWeight):
            if not isinstance(getattr(torch.Tensor, name), type):
                setattr(MergedWeight, name, method(name))


_define_methods()
