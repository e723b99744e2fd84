"""The compiled CPU kernels as functions of tensors, or the reason why they are missing.

Callers pass contiguous CPU tensors whose shapes and dtypes they have checked. Tensors of one
argument that differ in dtype are widened to fp32 first, which is exact.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch  # before the extension, so that both use the same OpenMP runtime

HUGE_PAGES_FROM = 4 << 20  # bytes
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def build_info() -> dict[str, dict[str, object]]:
    """What the installation built: part -> {"built": bool, "reason": str, ...}; may be empty."""
    path = Path(__file__).with_name("_build_info.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"{__package__}.{name}"), ""
    except ImportError as error:
        part = build_info().get(f"fastmerge.{name}", {})
        if part.get("reason"):
            return None, f"not built: {part['reason']}"
        return None, str(error) if part else "not built"


cpu, _cpu_reason = _load("_cpu")
cuda, _cuda_reason = _load("_cuda")


def available() -> bool:
    """Whether the CPU kernels can run."""
    return cpu is not None


def unavailable_reason() -> str:
    """Why the CPU kernels cannot run; empty when they can."""
    return _cpu_reason


def cuda_unavailable_reason() -> str:
    """Why the CUDA kernels cannot run; empty when they can."""
    if cuda is None:
        return _cuda_reason
    return cuda.device_info()["reason"]


def for_device(device: torch.device) -> tuple[ModuleType | None, str]:
    """The module with compiled kernels for a device (this one for the CPU), or None and why not."""
    if device.type == "cpu":
        return (sys.modules[__name__], "") if cpu is not None else (None, _cpu_reason)
    if device.type != "cuda":
        return None, f"there are no compiled kernels for {device.type} tensors"
    if cuda is None:
        return None, _cuda_reason
    kernels = importlib.import_module(f"{__package__}._native_cuda")
    reason = kernels.unavailable_reason(device)
    return (None, reason) if reason else (kernels, "")


def fresh(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor of a tensor's shape, for a result.

    Faulting in small pages costs several times what a streaming kernel takes to fill them, so a
    large CPU tensor asks for huge ones.
    """
    out = like.new_empty(like.shape, dtype=dtype)
    real = type(out) is torch.Tensor and out.device.type == "cpu"
    if cpu is not None and real and out.nbytes >= HUGE_PAGES_FROM:
        cpu.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def weighted_sum(
    bases: Sequence[torch.Tensor],
    deltas: Sequence[Sequence[torch.Tensor]],
    coefficients: torch.Tensor,
    outs: Sequence[torch.Tensor],
    experts: bool = False,
) -> None:
    """Write bases[l] + sum_k coefficients[l, k] * tau_lk into outs[l], in fp32, rounded once.

    Args:
        bases: L tensors of one dtype.
        deltas: L lists of K tensors; tau = delta - base with `experts`, else tau = delta.
        coefficients: fp32 [L, K].
        outs: L tensors of one dtype; outs[l] may be bases[l].
        experts: whether deltas are fine-tuned weights.
    """
    count = len(deltas[0]) if deltas else 0
    bases = _one_dtype(bases)
    flat = _one_dtype([delta for row in deltas for delta in row])
    cpu.weighted_sum(
        _addresses(bases),
        _addresses(flat),
        coefficients.data_ptr(),
        _addresses(outs),
        [out.numel() for out in outs],
        count,
        _code(bases),
        _code(flat),
        _code(outs),
        experts,
        torch.get_num_threads(),
    )


def coefficient_grad(
    grads: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor] | None,
    deltas: Sequence[Sequence[torch.Tensor]],
    experts: bool | None = None,
) -> torch.Tensor:
    """Inner products <grads[l], tau_lk> as fp64 [L, K].

    Args:
        grads: L tensors of one dtype.
        bases: L tensors of one dtype, or None.
        deltas: L lists of K tensors.
        experts: whether deltas are fine-tuned weights; by default, whether bases are given.
    """
    count = len(deltas[0]) if deltas else 0
    experts = bases is not None if experts is None else experts
    grads = _one_dtype(grads)
    bases = _one_dtype(bases or [])
    flat = _one_dtype([delta for row in deltas for delta in row])
    sizes = [grad.numel() for grad in grads]
    dots = torch.empty(len(sizes), count, dtype=torch.float64)
    scratch = _scratch(sum(cpu.scratch_doubles(size, count) for size in sizes))
    cpu.coefficient_grad(
        _addresses(grads),
        _addresses(bases) if experts else [0] * len(sizes),
        _addresses(flat),
        dots.data_ptr(),
        sizes,
        count,
        _code(grads),
        _code(bases),
        _code(flat),
        experts,
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return dots


def combine_and_dot(
    base: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    grad: torch.Tensor,
    out: torch.Tensor,
    experts: bool = False,
) -> torch.Tensor:
    """Write the weighted sum of one tensor into `out` and return <grad, tau_k> as fp64 [K].

    One read of base, deltas and grad; the bytes are those of weighted_sum and coefficient_grad.

    Args:
        base, grad, out: tensors of one size; out may be base but not grad.
        deltas: K tensors of that size.
        coefficients: fp32 [K].
        experts: whether deltas are fine-tuned weights.
    """
    deltas = _one_dtype(deltas)
    dots = torch.empty(len(deltas), dtype=torch.float64)
    scratch = _scratch(cpu.scratch_doubles(base.numel(), len(deltas)))
    cpu.combine_and_dot(
        base.data_ptr(),
        _addresses(deltas),
        coefficients.data_ptr(),
        grad.data_ptr(),
        out.data_ptr(),
        dots.data_ptr(),
        base.numel(),
        len(deltas),
        _code([base]),
        _code(deltas),
        _code([grad]),
        _code([out]),
        experts,
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return dots


def magnitude_histogram(
    base: torch.Tensor | None,
    delta: torch.Tensor,
    level: int,
    prefix: int,
    counts: torch.Tensor,
    experts: bool = False,
) -> None:
    """Add to `counts` how often each group of bits occurs among the magnitudes |tau|.

    With u the 31 bits of fp32 |tau|: level 0 counts u >> 15, level 1 counts u & 0x7fff among the
    entries whose u >> 15 is `prefix`.

    Args:
        base, delta: tensors of one size; base may be None without `experts`.
        counts: int64 [65536], added to.
        experts: whether delta holds fine-tuned weights.
    """
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, cpu.histogram_bins, dtype=torch.int64)
    cpu.magnitude_histogram(
        _address(base if experts else None),
        delta.data_ptr(),
        delta.numel(),
        _code([base] if experts else []),
        _code([delta]),
        experts,
        level,
        prefix,
        counts.data_ptr(),
        scratch.data_ptr(),
        threads,
    )


def magnitude_bracket(
    base: torch.Tensor | None,
    delta: torch.Tensor,
    low: int,
    shift: int,
    counts: torch.Tensor,
    experts: bool = False,
) -> None:
    """Add to `counts` how many magnitudes |tau| are below, in the bins of, and above a bracket.

    With u the 31 bits of fp32 |tau|: counts[0] counts u < low, counts[1 + j] those with
    (u - low) >> shift = j, the last one the rest.

    Args:
        base, delta: tensors of one size; base may be None without `experts`.
        low, shift: the bracket.
        counts: int64 [bins + 2], added to.
        experts: whether delta holds fine-tuned weights.
    """
    cpu.magnitude_bracket(
        _address(base if experts else None),
        delta.data_ptr(),
        delta.numel(),
        _code([base] if experts else []),
        _code([delta]),
        experts,
        low,
        shift,
        counts.numel() - 2,
        counts.data_ptr(),
        torch.get_num_threads(),
    )


def ties_merge(
    base: torch.Tensor | None,
    deltas: Sequence[torch.Tensor],
    thresholds: torch.Tensor,
    out: torch.Tensor,
    *,
    experts: bool = False,
    mode: int = 0,
    scaling: float = 1.0,
    majority: int | None = 0,
    add_base: bool = False,
) -> torch.Tensor:
    """Trim, elect and merge one tensor into `out`.

    out = scaling * merge of the kept tau_k that have the elected sign, plus base with `add_base`.

    Args:
        base: needed with `experts` or `add_base`.
        deltas: K tensors of one size.
        thresholds: fp32 [K]; tau_k is kept where |tau_k| >= thresholds[k].
        out: tensor of that size; may be base.
        mode: 0 mean, 1 sum, 2 largest magnitude.
        majority: the sign, -1, 0 or 1, where the kept values add up to zero; None takes the
            majority that the returned votes give.

    Returns:
        int64 [2]: the sum of the elected signs before `majority`, and the number of entries whose
        kept values cancel exactly.
    """
    if majority is None:
        # A first merge must not overwrite the base that the second one reads.
        shared = base is not None and _memory(base) == _memory(out)
        arguments = (base.clone() if shared else base, deltas, thresholds, out)
        options = dict(experts=experts, mode=mode, scaling=scaling, add_base=add_base)
        return _own_majority(lambda sign: ties_merge(*arguments, majority=sign, **options))
    deltas = _one_dtype(deltas)
    stats = torch.empty(2, dtype=torch.int64)
    cpu.ties_merge(
        _address(base),
        _addresses(deltas),
        thresholds.data_ptr(),
        out.data_ptr(),
        stats.data_ptr(),
        out.numel(),
        _code([] if base is None else [base]),
        _code(deltas),
        _code([out]),
        experts,
        mode,
        scaling,
        majority,
        add_base,
        torch.get_num_threads(),
    )
    return stats


def ties_masks(
    base: torch.Tensor | None,
    deltas: Sequence[torch.Tensor],
    thresholds: torch.Tensor,
    masks: torch.Tensor,
    *,
    experts: bool = False,
    majority: int | None = 0,
) -> torch.Tensor:
    """Write which entries of each tau_k TIES keeps and elects as packed bits.

    Args:
        masks: uint8 [K, ceil(n / 8)]: entry i is bit i % 8 of byte i // 8, unused bits are 0.
        base, deltas, thresholds, experts, majority: as in `ties_merge`.

    Returns:
        int64 [2] as from `ties_merge`.
    """
    if majority is None:
        arguments = (base, deltas, thresholds, masks)
        return _own_majority(lambda sign: ties_masks(*arguments, experts=experts, majority=sign))
    deltas = _one_dtype(deltas)
    stats = torch.empty(2, dtype=torch.int64)
    cpu.ties_masks(
        _address(base),
        _addresses(deltas),
        thresholds.data_ptr(),
        masks.data_ptr(),
        stats.data_ptr(),
        deltas[0].numel(),
        _code([] if base is None else [base]),
        _code(deltas),
        experts,
        majority,
        torch.get_num_threads(),
    )
    return stats


def magnitude_masks(
    base: torch.Tensor | None,
    deltas: Sequence[torch.Tensor],
    values: torch.Tensor,
    indices: torch.Tensor,
    masks: torch.Tensor,
    offset: int,
) -> None:
    """Write which entries lie between two cuts of the order of magnitudes as packed bits.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        values, indices: fp32 and int64 [K, 2], the upper and the lower cut.
        masks: uint8 [K, ceil(n / 8)].
        offset: index of the first entry in the whole tensor.
    """
    deltas = _one_dtype(deltas)
    cpu.magnitude_masks(
        _address(base),
        _addresses(deltas),
        values.data_ptr(),
        indices.data_ptr(),
        masks.data_ptr(),
        deltas[0].numel(),
        offset,
        _code([] if base is None else [base]),
        _code(deltas),
        base is not None,
        torch.get_num_threads(),
    )


def tie_counts(
    base: torch.Tensor | None,
    deltas: Sequence[torch.Tensor],
    values: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    width: int,
    offset: int,
) -> None:
    """Add to `counts` how many entries equal a magnitude, by their index.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        values, starts: fp32 and int64 [K], the magnitude and the first index counted.
        counts: int64 [K, bins], added to.
        width: indices of one bin.
        offset: index of the first entry in the whole tensor.
    """
    deltas = _one_dtype(deltas)
    cpu.tie_counts(
        _address(base),
        _addresses(deltas),
        values.data_ptr(),
        starts.data_ptr(),
        counts.data_ptr(),
        deltas[0].numel(),
        offset,
        width,
        counts.shape[1],
        _code([] if base is None else [base]),
        _code(deltas),
        base is not None,
        torch.get_num_threads(),
    )


def random_masks(
    base: torch.Tensor | None,
    deltas: Sequence[torch.Tensor],
    probabilities: torch.Tensor,
    masks: torch.Tensor,
    width: int,
    key: int,
    offset: int,
) -> None:
    """Write randomly kept entries as packed bits.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        probabilities: fp64 [K, 2], of the smallest and of the largest magnitude of a row.
        masks: uint8 [K, ceil(n / 8)].
        width: entries of one row.
        key: 64 bits.
        offset: index of the first entry in the whole tensor.
    """
    deltas = _one_dtype(deltas)
    ranked = bool((probabilities[:, 0] != probabilities[:, 1]).any())
    room = cpu.rank_scratch_bytes(width) if ranked else 0
    scratch = torch.empty(len(deltas) * room, dtype=torch.uint8)
    cpu.random_masks(
        _address(base),
        _addresses(deltas),
        probabilities.data_ptr(),
        masks.data_ptr(),
        scratch.data_ptr(),
        key % (1 << 64),
        deltas[0].numel(),
        offset,
        width,
        _code([] if base is None else [base]),
        _code(deltas),
        base is not None,
        torch.get_num_threads(),
    )


def masked_merge(
    base: torch.Tensor | None,
    deltas: Sequence[torch.Tensor],
    masks: torch.Tensor | None,
    factors: torch.Tensor,
    out: torch.Tensor,
    *,
    experts: bool,
    add_base: bool,
    elect: bool,
    normalize: bool,
    least: float,
    scaling: float,
) -> None:
    """Write the merge of masked task vectors into `out`, as `MaskedMergeParams` says.

    Args:
        base: needed with `experts` or `add_base`.
        deltas: K tensors of one size.
        masks: uint8 [1 or K, ceil(n / 8)], or None for all entries.
        factors: fp32 [3, K]: votes, values and weights.
        out: tensor of that size; may be base.
    """
    deltas = _one_dtype(deltas)
    cpu.masked_merge(
        _address(base),
        _addresses(deltas),
        _address(masks),
        _mask_stride(masks),
        factors.data_ptr(),
        out.data_ptr(),
        out.numel(),
        _code([] if base is None else [base]),
        _code(deltas),
        _code([out]),
        experts,
        elect,
        normalize,
        add_base,
        least,
        scaling,
        torch.get_num_threads(),
    )


def masked_sums(
    base: torch.Tensor | None,
    deltas: Sequence[torch.Tensor],
    masks: torch.Tensor | None,
    sums: torch.Tensor,
    width: int,
    square: bool,
) -> None:
    """Write the sums of |tau_k| or its square along rows, over all and over masked entries.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        masks: as in `masked_merge`.
        sums: fp64 [rows, 2, K].
        width: entries of one row.
    """
    deltas = _one_dtype(deltas)
    cpu.masked_sums(
        _address(base),
        _addresses(deltas),
        _address(masks),
        _mask_stride(masks),
        sums.data_ptr(),
        deltas[0].numel(),
        width,
        _code([] if base is None else [base]),
        _code(deltas),
        base is not None,
        square,
        torch.get_num_threads(),
    )


def row_gram(
    base: torch.Tensor | None, deltas: Sequence[torch.Tensor], gram: torch.Tensor, width: int
) -> None:
    """Write the inner products of all pairs of task vectors along rows.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        gram: fp64 [rows, K (K + 1) / 2], the upper triangle row by row.
        width: entries of one row.
    """
    deltas = _one_dtype(deltas)
    cpu.row_gram(
        _address(base),
        _addresses(deltas),
        gram.data_ptr(),
        deltas[0].numel(),
        width,
        _code([] if base is None else [base]),
        _code(deltas),
        base is not None,
        torch.get_num_threads(),
    )


def exact_sums(values: torch.Tensor, limbs: torch.Tensor) -> None:
    """Add the columns of values fp64 [rows, columns] to limbs int64 [columns, 67]."""
    cpu.exact_sums(values.data_ptr(), limbs.data_ptr(), *values.shape)


def task_variance(
    base: torch.Tensor | None, deltas: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """Write the variance over the K task vectors of every entry.

    Args:
        base: given if deltas are fine-tuned weights.
        deltas: K tensors of one size.
        out: fp32 tensor of that size.
    """
    deltas = _one_dtype(deltas)
    cpu.task_variance(
        _address(base),
        _addresses(deltas),
        out.data_ptr(),
        out.numel(),
        _code([] if base is None else [base]),
        _code(deltas),
        base is not None,
        torch.get_num_threads(),
    )


def softmax_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and log-sum-exp of every row, both fp32 [R].

    Args:
        logits: [R, C] with unit stride along C.
    """
    rows, cols = logits.shape
    entropy = torch.empty(rows, dtype=torch.float32)
    lse = torch.empty(rows, dtype=torch.float32)
    cpu.softmax_entropy(
        logits.data_ptr(),
        entropy.data_ptr(),
        lse.data_ptr(),
        rows,
        cols,
        logits.stride(0),
        _code([logits]),
        torch.get_num_threads(),
    )
    return entropy, lse


def softmax_entropy_backward(
    logits: torch.Tensor, entropy: torch.Tensor, lse: torch.Tensor, grad_entropy: torch.Tensor
) -> torch.Tensor:
    """Gradient of the entropy, -p (log p + H) * grad, in the logits' dtype [R, C].

    Args:
        logits: [R, C] with unit stride along C.
        entropy, lse: fp32 [R], the results of `softmax_entropy`.
        grad_entropy: fp32 [R].
    """
    rows, cols = logits.shape
    grad_logits = torch.empty(rows, cols, dtype=logits.dtype)
    cpu.softmax_entropy_backward(
        logits.data_ptr(),
        entropy.data_ptr(),
        lse.data_ptr(),
        grad_entropy.data_ptr(),
        grad_logits.data_ptr(),
        rows,
        cols,
        logits.stride(0),
        grad_logits.stride(0),
        _code([logits]),
        torch.get_num_threads(),
    )
    return grad_logits


def _own_majority(run: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Votes of run(0), which is followed by a run with their majority if that decides an entry."""
    stats = run(0)
    signs, cancelled = stats.tolist()
    if cancelled and signs:
        run(1 if signs > 0 else -1)
    return stats


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _code(tensors: Sequence[torch.Tensor]) -> int:
    return DTYPE_CODES[tensors[0].dtype] if tensors else 0


def _mask_stride(masks: torch.Tensor | None) -> int:
    return 0 if masks is None or masks.shape[0] == 1 else masks.shape[1]


def _one_dtype(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    if len({tensor.dtype for tensor in tensors}) <= 1:
        return tensors
    return [tensor.float() for tensor in tensors]


def _scratch(doubles: int) -> torch.Tensor:
    return torch.empty(doubles, dtype=torch.float64)
