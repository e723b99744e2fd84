"""What functions do with merged weights: merged linear layers, looked-up rows, patches, row views.

A handler returns NotImplemented where it has no better way than a built copy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import merged_samples, ops
from .deltas import Deltas, Stored
from .ops._library import accumulate_dtype
from .sample_values import SampleValues

HANDLERS: dict[Callable, Callable] = {}


def is_merged(value: object) -> bool:
    """Whether a value is a MergedWeight, without importing it."""
    return getattr(type(value), "is_merged_weight", False)


def as_tuple(value: Any) -> tuple:
    """A list or tuple as a tuple, anything else as a tuple of it."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def build(value: Any) -> Any:
    """`value` with every MergedWeight in it replaced by a combined copy, or one a sample."""
    if is_merged(value):
        return merged_samples.of_samples(value) if value.per_sample else value.value()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(build(v) for v in value)
    if type(value) is dict:
        return {k: build(v) for k, v in value.items()}
    return value


def plain_sum(base: Tensor, deltas: Deltas, coefficients: Tensor) -> Tensor:
    """base + sum_k coefficients_k tau_k in plain PyTorch, which torch.func can transform."""
    stored = deltas.tensors if isinstance(deltas, Stored) else ()
    dtype = accumulate_dtype(base, *stored[:1], coefficients)
    total = base.to(dtype)
    taus = deltas.task_vectors(base, dtype)
    for coefficient, tau in zip(coefficients.to(dtype).unbind(), taus, strict=True):
        total = total + coefficient * tau
    return total.to(base.dtype)


def implements(*functions: Callable) -> Callable:
    """Make the decorated function answer for these functions of torch."""

    def decorator(handler: Callable) -> Callable:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return decorator


def _autocast(x: Tensor, weight: Any) -> Tensor:
    """x in the dtype a linear layer would compute in, under autocast or not."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    if x.dtype != weight.base.dtype:
        raise RuntimeError(
            f"input of merged weight {weight.name!r} is {x.dtype}, expected {weight.base.dtype}"
        )
    return x


@implements(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_merged(weight) or weight.base.dim() != 2 or is_merged(input):
        return NotImplemented
    return _merged_linear("merged_linear", _autocast(input, weight), weight, build(bias))


def _merged_linear(how: str, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """x W^T + bias [..., O]; the outputs of chunks with coefficients of their own side by side."""
    if weight.per_sample or isinstance(bias, SampleValues):
        return merged_samples.linear(how, x, weight, bias)
    weight.count(how, x.shape[:-1].numel(), x.dtype)
    chunks = weight.chunks()
    whole = bias is None or len(chunks) == 1
    parts = [bias if whole else bias[start:stop] for start, stop, *_ in chunks]
    outputs = [
        ops.merged_linear(x, *_matrix(base, deltas), row, part)
        for (_, _, base, deltas, row), part in zip(chunks, parts, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _matrix(base: Tensor, deltas: Deltas) -> tuple[Tensor, Deltas]:
    """Base and deltas as [O, I]."""
    return (base, deltas) if base.dim() == 2 else (base.flatten(1), deltas.flat())


@implements(torch.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta=1, alpha=1, out=None) -> Tensor:
    """The layout of GPT-2's Conv1D: weights are [I, O]."""
    if not is_merged(mat2) or is_merged(mat1) or beta != 1 or alpha != 1 or out is not None:
        return NotImplemented
    return NotImplemented if input.dim() != 1 else _product(mat1, mat2, build(input))


@implements(torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
def _matmul(input: Tensor, other: Tensor, *, out=None) -> Tensor:
    """x @ W, the layout of CLIP's projections: weights are [I, O]."""
    if not is_merged(other) or is_merged(input) or other.base.dim() != 2 or out is not None:
        return NotImplemented
    return NotImplemented if input.dim() == 0 else _product(input, other, None)


@implements(torch.Tensor.__rmatmul__)
def _rmatmul(weight: Tensor, input: Tensor) -> Tensor:
    return _matmul(input, weight)


def _product(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """x W + bias with W [I, O]; the products of chunks with coefficients of their own add up."""
    x, total = _autocast(x, weight), None
    if weight.per_sample:
        return merged_samples.linear("merged_linear", x, weight, bias, transpose=True)
    weight.count("merged_linear", x.shape[:-1].numel(), x.dtype, transpose=True)
    for start, stop, base, deltas, row in weight.chunks():
        y = ops.merged_linear(x[..., start:stop], base, deltas, row, bias, transpose=True)
        total, bias = y if total is None else total + y, None
    return total


@implements(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Combine only the rows that are looked up, or the whole table if that is smaller.

    The coefficients' gradient is dense, so `sparse` changes nothing.
    """
    if not is_merged(weight):
        return NotImplemented
    _refuse_max_norm(weight, max_norm)
    if weight.per_sample:
        return merged_samples.embedding(input, weight, padding_idx)
    if scale_grad_by_freq or input.numel() >= weight.base.shape[0]:
        table = weight.combined()
        return F.embedding(input, table, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    ids = input.reshape(-1)
    weight.count("rows", ids.numel())
    base, deltas = weight.base.index_select(0, ids), weight.deltas.gather(ids)  # [R, D]
    rows = None
    for start, _, row in weight.spans:
        combined = ops.weighted_sum(base, deltas, weight.row(row))
        later = (ids >= start).unsqueeze(-1)
        rows = combined if rows is None else torch.where(later, combined, rows)
    if padding_idx is not None:
        padding = padding_idx if padding_idx >= 0 else weight.base.shape[0] + padding_idx
        rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
    return rows.view(*input.shape, weight.base.shape[1])


@implements(F.embedding_bag)
def _embedding_bag(
    input: Tensor, weight: Tensor, offsets: Any = None, max_norm: Any = None, *args, **kwargs
) -> Tensor:
    if is_merged(weight):
        _refuse_max_norm(weight, max_norm)
    return NotImplemented


def _refuse_max_norm(weight: Any, max_norm: float | None) -> None:
    if max_norm is not None:
        raise RuntimeError(
            f"max_norm would change merged weight {weight.name!r} in place: set max_norm to None, "
            "or call fastmerge.materialize(model) for ordinary weights"
        )


def _patch_convolution(
    input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    """Convolution with stride = kernel size, or a kernel of one entry, as merged linear layer."""
    if not is_merged(weight) or is_merged(input):
        return NotImplemented
    kernel = list(weight.base.shape[2:])
    spatial = len(kernel)
    strides = list(as_tuple(stride))
    strides = strides * spatial if len(strides) == 1 else strides
    no_padding = padding == "valid" or all(p == 0 for p in as_tuple(padding))
    undilated = all(d == 1 for d in as_tuple(dilation)) or math.prod(kernel) == 1
    batched = input.dim() == spatial + 2
    if not (no_padding and undilated and batched) or groups != 1:
        return NotImplemented
    if math.prod(kernel) == 1:  # a 1 x 1 kernel looks at one place per stride
        input = input[(..., *(slice(None, None, step) for step in strides))]
    elif strides != kernel:
        return NotImplemented
    patches = _unfold(input, kernel)
    with _computed_again(patches, input, lambda: _unfold(input, kernel)):
        x = _autocast(patches, weight)
        y = _merged_linear("patches", x, weight, build(bias))  # [B, n1, .., O]
    return y.movedim(-1, 1)


def _unfold(input: Tensor, kernel: Sequence[int]) -> Tensor:
    """Patches of a kernel's size side by side: [B, C, size1, ..] -> [B, n1, .., C * k1 * ..]."""
    spatial = len(kernel)
    counts = [size // k for size, k in zip(input.shape[2:], kernel, strict=True)]
    cropped = input
    for axis, (count, k) in enumerate(zip(counts, kernel, strict=True)):
        cropped = cropped.narrow(axis + 2, 0, count * k)
    split = [n for pair in zip(counts, kernel, strict=True) for n in pair]
    patches = cropped.reshape(*input.shape[:2], *split)  # [B, C, n1, k1, n2, k2, ...]
    outer = [2 + 2 * i for i in range(spatial)]
    inner = [3 + 2 * i for i in range(spatial)]
    return patches.permute(0, *outer, 1, *inner).flatten(1 + spatial)


def _computed_again(patches: Tensor, input: Tensor, again: Callable[[], Tensor]) -> Any:
    """Within the context autograd keeps the input instead of the patches, which are a copy of it.

    Raises:
        RuntimeError: in the backward pass, if the input was changed in place meanwhile.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or input.requires_grad
    ):
        return contextlib.nullcontext()
    version = input._version

    def pack(saved: Tensor) -> Tensor | None:
        copied = saved.data_ptr() == patches.data_ptr() and saved.shape == patches.shape
        return None if copied else saved

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        if input._version != version:
            raise RuntimeError(
                "the input of a merged patch convolution was changed in place before the backward "
                f"pass: it is at version {input._version}, expected {version}"
            )
        return again()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


implements(F.conv1d, F.conv2d, F.conv3d)(_patch_convolution)


# nn.MultiheadAttention (open_clip, nn.TransformerEncoderLayer) passes its packed weight to this
# function of torch, which hands everything over as soon as one argument is no plain tensor. Here
# are its own instructions without that first question, so that the linear layers inside it get
# merged weights.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    F.__dict__ | {"has_torch_function": lambda arguments: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


@implements(F.multi_head_attention_forward)
def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    with merged_samples.batch_second((*args, *kwargs.values())):
        return _attention(*args, **kwargs)


@implements(F.layer_norm)
def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    shape = list(normalized_shape)
    per_sample = _norm(lambda x: F.layer_norm(x, shape, eps=eps), input, len(shape), weight, bias)
    if per_sample is not NotImplemented or not isinstance(input, Tensor):
        return per_sample
    return F.layer_norm(build(input), shape, build(weight), build(bias), eps)


@implements(F.rms_norm)
def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    shape = list(normalized_shape)
    return _norm(lambda x: F.rms_norm(x, shape, eps=eps), input, len(shape), weight, None)


def _norm(normalize: Callable, input: Any, dims: int, weight: Any, bias: Any) -> Any:
    merged = next((p for p in (weight, bias) if is_merged(p) and p.per_sample), None)
    if merged is None or not isinstance(input, Tensor):
        return NotImplemented
    return merged_samples.norm(normalize, input, dims, weight, bias, merged)


@implements(torch.narrow, torch.Tensor.narrow)
def _narrow(input: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A view of rows of a merged weight is a merged weight."""
    if dim not in (0, -input.base.dim()) or not isinstance(start, int):
        return NotImplemented
    rows = input.base.shape[0]
    start = start + rows if start < 0 else start
    if not 0 <= start <= start + length <= rows:
        raise IndexError(
            f"rows {start} to {start + length} of merged weight {input.name!r} with {rows} rows"
        )
    return input.rows(start, start + length)


@implements(torch.split, torch.Tensor.split)
def _split(input: Tensor, split_size: int | Sequence[int], dim: int = 0) -> Any:
    if dim not in (0, -input.base.dim()) or input.base.shape[0] == 0:
        return NotImplemented
    rows, sizes = input.base.shape[0], split_size
    if isinstance(sizes, int):
        sizes = [min(sizes, rows - start) for start in range(0, rows, sizes)]
    if sum(sizes) != rows:
        raise RuntimeError(
            f"split sizes {list(sizes)} of merged weight {input.name!r} add up to {sum(sizes)}, "
            f"expected its {rows} rows"
        )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(input.rows(a, a + size) for a, size in zip(starts, sizes, strict=True))


@implements(torch.chunk, torch.Tensor.chunk)
def _chunk(input: Tensor, chunks: int, dim: int = 0) -> Any:
    if dim not in (0, -input.base.dim()):
        return NotImplemented
    return _split(input, max(1, -(-input.base.shape[0] // chunks)))


@implements(torch.Tensor.__getitem__)
def _getitem(input: Tensor, index: Any) -> Tensor:
    """w[a:b], and w[i] of stacked weights [E, O, I], of which each expert layer uses its own."""
    if not is_merged(input) or input.base.dim() == 0:
        return NotImplemented
    if isinstance(index, slice):
        start, stop, step = index.indices(input.base.shape[0])
        return input.rows(start, max(start, stop)) if step == 1 else NotImplemented
    number = isinstance(index, int) and not isinstance(index, bool)
    if isinstance(index, Tensor) and index.dim() == 0 and not torch.compiler.is_compiling():
        number = not (index.is_floating_point() or index.dtype == torch.bool)
    if not number or input.base.dim() < 3:
        return NotImplemented
    index, rows = int(index), input.base.shape[0]
    if not -rows <= index < rows:
        raise IndexError(f"index {index} of merged weight {input.name!r} with {rows} rows")
    return input.part(index % rows)
