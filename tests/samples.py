"""Seeded inputs of the op tests, in the shapes, dtypes and memory layouts that hurt kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIZES = [0, 1, 7, 255, 257, 8193]
LAYOUTS = ["contiguous", "unaligned", "strided"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# base and delta dtypes
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]


def dtype_id(dtypes: object) -> str:
    """Readable test ids: "bfloat16-float32"."""
    values = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    return "-".join(str(d).removeprefix("torch.") for d in values)


def random(shape: int | tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal values, drawn in fp64 and rounded."""
    generator = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else shape
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def grid(shape: int | tuple[int, ...], dtype: torch.dtype, seed: int, span: int = 4) -> Tensor:
    """Small multiples of 1/8: sums are exact, equal magnitudes and cancellations abound."""
    generator = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else shape
    return (torch.randint(-span, span + 1, shape, generator=generator) / 8).to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other memory: at an odd address, or with gaps between the elements."""
    if layout == "contiguous":
        return tensor
    if layout == "unaligned":
        memory = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype)
        memory[1:] = tensor.flatten()
        return memory[1:].view(tensor.shape)
    memory = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
    memory[..., 0] = tensor
    return memory[..., 0]


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes, so that equal means equal, NaN and signed zero included."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bytes_for_threads(run: Callable[[], tuple[Tensor, ...]]) -> None:
    """Assert that 1, 2 and 3 threads give the same bytes."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([raw(tensor) for tensor in run()])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def make_deltas(
    base: Tensor, count: int, dtype: torch.dtype, experts: bool, layout: str = "contiguous"
) -> list[Tensor]:
    """K experts near `base` or K task vectors, and the same in fp64 differences."""
    steps = [random(tuple(base.shape), torch.float64, 50 + k) * 0.1 for k in range(count)]
    origin = base.double() if experts else 0
    return [laid_out((origin + step).to(dtype), layout) for step in steps]


def task_vectors(base: Tensor, deltas: list[Tensor], experts: bool) -> list[Tensor]:
    """tau_k in fp64."""
    return [d.double() - base.double() if experts else d.double() for d in deltas]
