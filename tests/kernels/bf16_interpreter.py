"""Makes Triton's interpreter compute with bfloat16 as a GPU does; without it tests prove nothing.

The interpreter keeps bf16 values as raw 16-bit integers: it multiplies those integers in `tl.dot`,
cuts fp32 values off instead of rounding them, and adds bit patterns. Here casts round like torch,
dots multiply real values, and any other arithmetic on bf16 is refused, because the kernels are
meant to do theirs in fp32.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def install() -> None:
    """Patch the interpreter for the rest of the process."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(_to_fp32(src.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(_to_bf16(src.data), target)
        if tl.bfloat16 in (source, target):
            raise NotImplementedError(f"cast from {source} to {target}")
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            TensorHandle(_to_fp32(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
            for t in (a, b)
        )
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def refusing(original):
        def operation(self, *operands):
            if any(getattr(t, "dtype", tl.void).scalar == tl.bfloat16 for t in operands[:-1]):
                raise NotImplementedError("arithmetic on bf16; convert to fp32 first")
            return original(self, *operands)

        return operation

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = refusing(InterpreterBuilder.binary_op)
    InterpreterBuilder.unary_op = refusing(InterpreterBuilder.unary_op)
    InterpreterBuilder.create_fma = _fma


def _fma(self, x, y, z):
    """fp32 multiply-add with one rounding: the product of two fp32 numbers is exact in fp64."""
    if x.dtype.scalar != tl.float32:
        raise NotImplementedError(f"fma in {x.dtype.scalar}")
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(exact.astype(np.float32), tl.float32)
