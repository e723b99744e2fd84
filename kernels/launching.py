"""What every launcher needs: argument checks, device limits, the choice of a configuration."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_EXPERTS = 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)
MAX_REGISTERS = 255  # of a thread, in every architecture
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_LIMITS = (9, 232448)  # an interpreted launch takes sm_90's configurations

_chosen: dict[Hashable, Config] = {}


@dataclass(frozen=True)
class Config:
    """One launch configuration: a tile of `out` x `rows` outputs, `inner` columns per step.

    `inner` follows from dtypes and device alone: it is the only entry that could change the order
    of a sum, so measuring must not choose it.
    """

    out: int
    rows: int
    inner: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        # Left to itself, the assembler spills a few registers to reach a rounder number of them.
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": MAX_REGISTERS}


def cdiv(numerator: int, denominator: int) -> int:
    """Quotient of two positive integers, rounded up."""
    return -(-numerator // denominator)


def power_of_two(value: int) -> int:
    """Smallest power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


def refusal(
    op: str, tensors: Mapping[str, Tensor | None], deltas: Sequence[Tensor] | None = None
) -> str | None:
    """Why the Triton kernels cannot run `op` on these tensors, or None if they can.

    Args:
        op: name of the op, the start of the message.
        tensors: arguments by name; None entries are skipped. The first gives the device.
        deltas: the K deltas, where the op has them.
    """
    if importlib.util.find_spec("triton") is None:
        return f"{op}: triton is not installed"
    if deltas is not None and not 1 <= len(deltas) <= MAX_EXPERTS:
        return f"{op}: {len(deltas)} deltas, expected 1 to {MAX_EXPERTS}"
    given = {name: t for name, t in tensors.items() if t is not None}
    given |= {f"deltas[{k}]": delta for k, delta in enumerate(deltas or ())}
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"{op}: {name} is {tensor.dtype}, expected one of {expected}"
    for k, delta in enumerate(deltas or ()):
        if delta.dtype != deltas[0].dtype:
            return f"{op}: deltas[{k}] is {delta.dtype}, expected {deltas[0].dtype} as deltas[0]"
    first, device = next((name, t.device) for name, t in given.items())
    for name, tensor in given.items():
        if tensor.device != device:
            return f"{op}: {name} is on {tensor.device}, expected {device} as {first}"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"{op}: {first} is on {device}, expected a CUDA device"
    return _device_refusal(op, device)


def _device_refusal(op: str, device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return f"{op}: torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found, expected = (".".join(map(str, c)) for c in (capability, MIN_CAPABILITY))
        return f"{op}: {device} has compute capability {found}, expected {expected} or newer"
    return None


def check(
    op: str, tensors: Mapping[str, Tensor | None], deltas: Sequence[Tensor] | None = None
) -> None:
    """Raise RuntimeError with the reason if the Triton kernels cannot run `op`."""
    reason = refusal(op, tensors, deltas)
    if reason is not None:
        raise RuntimeError(reason)


def check_shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[int]) -> None:
    """Raise RuntimeError if a tensor is given and its shape is not the expected one."""
    if tensor is not None and list(tensor.shape) != list(expected):
        raise RuntimeError(
            f"{op}: {name} has shape {list(tensor.shape)}, expected {list(expected)}"
        )


def check_deltas(op: str, deltas: Sequence[Tensor], expected: Sequence[int]) -> None:
    """Raise RuntimeError if a delta does not have the expected shape."""
    for k, delta in enumerate(deltas):
        check_shape(op, f"deltas[{k}]", delta, expected)


def check_masks(op: str, masks: Tensor, expected: Sequence[int], device: torch.device) -> None:
    """Raise RuntimeError if packed masks do not have the expected shape, dtype and device."""
    check_shape(op, "masks", masks, expected)
    if masks.dtype != torch.uint8 or masks.device != device:
        raise RuntimeError(
            f"{op}: masks is {masks.dtype} on {masks.device}, expected torch.uint8 on {device}"
        )


def device_limits(device: torch.device) -> tuple[int, int]:
    """(major compute capability, bytes of shared memory a block may use) of the device."""
    if device.type != "cuda":
        return INTERPRETED_LIMITS
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.shared_memory_per_block_optin


def like_layout(base: Tensor, deltas: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Base and deltas with one common pair of strides, one of them 1; copies only what differs."""
    stride = deltas[0].stride()
    if 1 in stride and all(t.stride() == stride for t in (base, *deltas)):
        return base, tuple(deltas)
    return base.contiguous(), tuple(t.contiguous() for t in deltas)


def by_rows(matrix: Tensor) -> Tensor:
    """The matrix itself if neighbours in a row are neighbours in memory, else a copy that is so."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def is_aligned(*matrices: Tensor) -> bool:
    """Whether all matrices can be copied 16 bytes at a time, judged by shape, strides and offset.

    Of 16 elements rather than bytes, which is what Triton looks for.
    """
    return all(map(_is_aligned, matrices))


def _is_aligned(matrix: Tensor) -> bool:
    if matrix.storage_offset() * matrix.element_size() % 16:
        return False
    for contiguous, other in ((1, 0), (0, 1)):
        if matrix.stride(contiguous) == 1:
            return matrix.shape[contiguous] % 16 == 0 and matrix.stride(other) % 16 == 0
    return False


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def choose(key: Hashable, configs: Sequence[Config], launch: Callable[[Config], None]) -> Config:
    """The fastest of `configs` by measurement, remembered per key for the process.

    Every configuration writes the same bytes, so measuring may run on the real output. The first
    one is taken unmeasured where nothing can be measured: in the interpreter, while a CUDA graph
    is captured, or with FASTMERGE_TUNE=0.
    """
    if len(configs) == 1 or INTERPRETED or os.environ.get("FASTMERGE_TUNE") == "0":
        return configs[0]
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        _chosen[key] = min(configs, key=lambda config: _milliseconds(config, launch))
    return _chosen[key]


def fitting(
    op: str, what: str, configs: Sequence[Config], needed: Callable[[Config], int], limit: int
) -> list[Config]:
    """The configurations whose shared memory a block may use.

    Args:
        op, what: for the message: what needs the memory.
        needed: bytes of a configuration.
        limit: bytes of shared memory a block may use.

    Raises:
        RuntimeError: none fits.
    """
    found = [config for config in configs if needed(config) <= limit]
    if not found:
        raise RuntimeError(
            f"{op}: {what} {min(map(needed, configs))} bytes of shared memory per block, "
            f"found {limit}"
        )
    return found


def run(
    like: Tensor, key: Hashable, configs: Sequence[Config], launch: Callable[[Config], None]
) -> None:
    """Launch the configuration that `choose` takes, on a tensor's device."""
    with on_device(like):
        launch(choose((like.device, key), configs, launch))


@dataclass(frozen=True)
class Linear:
    """Checked arguments of a kernel that multiplies activations with K + 1 weights.

    Attributes:
        x: [rows, inner], neighbours in a row are neighbours in memory.
        base, deltas: weights of one pair of strides, that of an output and that of an input first.
        coefficients: fp32, contiguous.
        dtypes: of x, base and deltas as they were given.
        aligned: whether x and the weights can be copied 16 bytes at a time.
    """

    x: Tensor
    base: Tensor
    deltas: tuple[Tensor, ...]
    coefficients: Tensor
    bias: Tensor | None
    rows: int
    inner: int
    outer: int
    strides: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    aligned: bool


def linear_arguments(
    op: str,
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Tensor,
    bias: Tensor | None,
    transpose: bool,
    other: Tensor | None = None,
) -> Linear:
    """Check and lay out the arguments of a linear layer's kernel.

    Args:
        x: [R, I].
        base, deltas: [O, I], or [I, O] with `transpose`.
        coefficients: [K] or [R, K], which the caller checks.
        bias: [O] or None.
        other: [R, O] or None.

    Raises:
        RuntimeError: names the argument that does not fit.
    """
    named = {"base": base, "coefficients": coefficients, "bias": bias, "other": other}
    check(op, {"x": x, **named}, deltas)
    check_deltas(op, deltas, base.shape)
    inner, outer = base.shape if transpose else reversed(base.shape)
    rows = x.shape[0]
    check_shape(op, "x", x, [rows, inner])
    check_shape(op, "bias", bias, [outer])
    check_shape(op, "other", other, [rows, outer])
    dtypes = x.dtype, base.dtype, deltas[0].dtype
    x = by_rows(x)
    base, deltas = like_layout(base, deltas)
    return Linear(
        x,
        base,
        deltas,
        coefficients.float().contiguous(),
        None if bias is None else bias.contiguous(),
        rows,
        inner,
        outer,
        base.stride()[::-1] if transpose else base.stride(),
        dtypes,
        is_aligned(x, base, *deltas),
    )


def _milliseconds(config: Config, launch: Callable[[Config], None], repeats: int = 5) -> float:
    """Median time of a few launches, after one that compiles; infinity if it does not fit."""
    from triton.runtime.errors import OutOfResources

    try:
        launch(config)
    except OutOfResources:
        return float("inf")
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(config)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[repeats // 2]
