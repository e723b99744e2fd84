"""Entropy of each row's softmax and its gradient; probabilities exist in registers only.

One pass keeps, per lane, the running maximum m, s = sum e^(x - m) and t = sum e^(x - m) (x - m);
lanes are then brought to the row's maximum and added pairwise. With them H = log s - t / s. Lanes,
blocks and the order of every sum follow from C alone, so no launch parameter changes the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Config, cdiv, check, check_shape, power_of_two, run
from .tiles import ordered_sum


@triton.jit
def _softmax_entropy_kernel(
    logits_ptr,
    entropy_ptr,
    normalizer_ptr,
    rows,
    classes,
    stride_r,
    stride_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    top = tl.full([BLOCK_R, BLOCK_C], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    t = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for _ in range(tl.cdiv(classes, BLOCK_C)):
        mask = (r[:, None] < rows) & (c[None, :] < classes)
        offsets = r[:, None] * stride_r + c[None, :] * stride_c
        x = tl.load(logits_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        # A lane that has seen only -inf stays at s = t = 0; -inf - -inf would be NaN.
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        shift = tl.where(top == float("-inf"), 0.0, top - origin)
        distance = tl.where(x == float("-inf"), 0.0, x - origin)
        weight = tl.where(x == float("-inf"), 0.0, tl.exp(distance))
        scale = tl.exp(shift)
        t = tl.fma(weight, distance, scale * tl.fma(s, shift, t))
        s = tl.fma(scale, s, weight)
        top = new_top
        c += BLOCK_C
    row_top = tl.max(top, axis=1)  # [R]
    origin = tl.where(row_top == float("-inf"), 0.0, row_top)
    shift = tl.where(top == float("-inf"), 0.0, top - origin[:, None])
    scale = tl.exp(shift)
    t = ordered_sum(scale * tl.fma(s, shift, t), BLOCK_R, BLOCK_C)
    s = ordered_sum(scale * s, BLOCK_R, BLOCK_C)
    log_s = tl.log(s)
    tl.store(entropy_ptr + r, log_s - t / s, mask=r < rows)
    tl.store(normalizer_ptr + 2 * r, row_top, mask=r < rows)
    tl.store(normalizer_ptr + 2 * r + 1, log_s, mask=r < rows)


@triton.jit
def _softmax_entropy_backward_kernel(
    grad_ptr,
    logits_ptr,
    entropy_ptr,
    normalizer_ptr,
    out_ptr,
    rows,
    classes,
    stride_r,
    stride_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = r < rows
    top = tl.load(normalizer_ptr + 2 * r, mask=inside, other=0.0)
    log_s = tl.load(normalizer_ptr + 2 * r + 1, mask=inside, other=0.0)
    entropy = tl.load(entropy_ptr + r, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + r, mask=inside, other=0.0)
    mask = inside[:, None] & (c[None, :] < classes)
    offsets = r[:, None] * stride_r + c[None, :] * stride_c
    x = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    log_p = x - top[:, None] - log_s[:, None]
    p = tl.exp(log_p)
    slope = tl.where(p == 0.0, 0.0, -p * (log_p + entropy[:, None]))
    out = (slope * grad[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + r[:, None] * classes + c[None, :], out, mask=mask)


MAX_LANES = 1024
# (rows, warps): neither takes part in any sum.
LAUNCHES = ((1, 4), (4, 4), (1, 8))


def lanes(classes: int) -> int:
    """Lanes per row, from C alone: they group the terms of every sum."""
    return min(MAX_LANES, power_of_two(classes))


def configurations(classes: int) -> list[Config]:
    """Rows per program and warps; short rows share a program so that its threads have work."""
    block = lanes(classes)
    return [
        Config(block, rows * max(1, 512 // block), 1, warps, stages=2) for rows, warps in LAUNCHES
    ]


def softmax_entropy_forward(logits: Tensor) -> tuple[Tensor, Tensor]:
    """H = -sum_c p_c log p_c with p = softmax(logits), natural logarithm.

    Args:
        logits: [R, C >= 1], fp32/fp16/bf16, any strides. A logit of -inf is probability 0.

    Returns:
        H [R] fp32 and the normalizer [R, 2] fp32: a row's largest logit m and log sum e^(x - m).
        They stay apart because their sum, log sum e^x, would lose the bits that p needs.
        Rows with NaN, with +inf or with nothing but -inf give NaN.

    Raises:
        RuntimeError: dtype, device or shape does not fit.
    """
    op = "softmax_entropy"
    check(op, {"logits": logits})
    rows, classes = _shape(op, logits)
    entropy = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normalizer = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return entropy, normalizer

    def launch(config: Config) -> None:
        _softmax_entropy_kernel[(cdiv(rows, config.rows),)](
            logits,
            entropy,
            normalizer,
            rows,
            classes,
            *logits.stride(),
            BLOCK_R=config.rows,
            BLOCK_C=config.out,
            enable_fp_fusion=False,
            **config.launch,
        )

    key = (op, logits.dtype, power_of_two(rows), classes)
    run(logits, key, configurations(classes), launch)
    return entropy, normalizer


def softmax_entropy_backward(
    grad: Tensor, logits: Tensor, entropy: Tensor, normalizer: Tensor
) -> Tensor:
    """dH/dlogits_c = -p_c (log p_c + H), times the row's incoming gradient.

    Args:
        grad: [R] fp32/fp16/bf16.
        logits: [R, C], as given to the forward pass.
        entropy: [R] fp32, of the forward pass.
        normalizer: [R, 2] fp32, of the forward pass.

    Returns:
        [R, C] in logits' dtype.

    Raises:
        RuntimeError: dtype, device or shape does not fit.
    """
    op = "softmax_entropy_backward"
    named = {"grad": grad, "entropy": entropy, "normalizer": normalizer}
    check(op, {"logits": logits, **named})
    rows, classes = _shape(op, logits)
    for name, shape in {"grad": [rows], "entropy": [rows], "normalizer": [rows, 2]}.items():
        check_shape(op, name, named[name], shape)
    out = torch.empty(rows, classes, dtype=logits.dtype, device=logits.device)
    if rows == 0:
        return out
    grad, entropy, normalizer = (t.float().contiguous() for t in (grad, entropy, normalizer))

    def launch(config: Config) -> None:
        _softmax_entropy_backward_kernel[(cdiv(rows, config.rows), cdiv(classes, config.out))](
            grad,
            logits,
            entropy,
            normalizer,
            out,
            rows,
            classes,
            *logits.stride(),
            BLOCK_R=config.rows,
            BLOCK_C=config.out,
            enable_fp_fusion=False,
            **config.launch,
        )

    key = (op, logits.dtype, power_of_two(rows), classes)
    run(logits, key, configurations(classes), launch)
    return out


def _shape(op: str, logits: Tensor) -> tuple[int, int]:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise RuntimeError(f"{op}: logits has shape {list(logits.shape)}, expected [R, C >= 1]")
    return logits.shape[0], logits.shape[1]
