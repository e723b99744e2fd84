"""Inputs of the value tests: random ones, and whole numbers with which every sum is exact."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (3, 7, 5), (17, 65, 130), (70, 129, 67), (2, 0, 3), (0, 4, 3)]  # R, I, O


def normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(device=device, dtype=dtype)


def whole(
    *shape: int, seed: int, dtype: torch.dtype, device: torch.device, size: int = 2
) -> Tensor:
    """Whole numbers of magnitude `size` at most: exact in bf16, and so are their sums in fp32."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-size, size + 1, shape, generator=generator)
    return values.to(device=device, dtype=dtype)


def weights(
    make, outer: int, inner: int, count: int, transpose: bool, dtype: torch.dtype, device
) -> tuple[Tensor, list[Tensor]]:
    """Base and K deltas, [outer, inner] or [inner, outer] with `transpose`."""
    shape = (inner, outer) if transpose else (outer, inner)
    base = make(*shape, seed=1, dtype=dtype, device=device)
    return base, [make(*shape, seed=10 + k, dtype=dtype, device=device) for k in range(count)]


def task_vectors(base: Tensor, deltas: list[Tensor], experts: bool, transpose: bool) -> Tensor:
    """[K, outer, inner] task vectors in fp64."""
    taus = torch.stack([d.double() - (base.double() if experts else 0) for d in deltas])
    return taus.transpose(1, 2) if transpose else taus


def merged(
    base: Tensor, deltas: list[Tensor], coefficients: Tensor, experts: bool, transpose: bool
) -> Tensor:
    """[outer, inner] merged weight in fp64; [R, outer, inner] for coefficients [R, K]."""
    taus = task_vectors(base, deltas, experts, transpose)
    weight = base.double().t() if transpose else base.double()
    return weight + torch.einsum("...k,koi->...oi", coefficients.double(), taus)
