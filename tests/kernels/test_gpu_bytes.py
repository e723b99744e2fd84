"""The same bytes from run to run and from every configuration; needs a CUDA device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastmerge import kernels
from fastmerge.kernels import launching
from fastmerge.ops._bits import pack_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def calls() -> dict[str, tuple]:
    """Launcher and arguments on the device."""
    generator = torch.Generator(device="cuda").manual_seed(1)

    def random(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    base, *deltas = (random(512, 1024) for _ in range(9))
    x, dy, bias = random(700, 1024), random(700, 512), random(512)
    lam, rows_lam = random(8, dtype=torch.float32), random(700, 8, dtype=torch.float32)
    masks = pack_rows(random(8, 512, 1024) > 0)
    few = x[:3], base, deltas, lam, bias, True, False
    return {
        "forward": ("merged_linear_forward", (x, *few[1:])),
        "few rows": ("merged_linear_forward", few),
        "dx": ("merged_linear_backward_x", (dy, base, deltas, lam, True, False)),
        "grad": ("linear_coefficient_grad", (dy, x, base, deltas, False)),
        "rows": ("row_linear_backward", (dy, x, base, deltas, rows_lam, True, False)),
        "masks": ("masked_linear_backward", (dy, x, base, deltas[0], masks, rows_lam, False)),
        "entropy": ("softmax_entropy_forward", (x,)),
    }


@pytest.mark.parametrize("name", ["forward", "few rows", "dx", "grad", "rows", "masks", "entropy"])
def test_same_bytes(name, monkeypatch):
    launcher, arguments = calls()[name]
    chosen: list[int] = []

    def run(index: int) -> list[torch.Tensor]:
        def choose(key, configs, launch):
            chosen.append(len(configs))
            return configs[index % len(configs)]

        monkeypatch.setattr(launching, "choose", choose)
        result = getattr(kernels, launcher)(*arguments)
        return list(result) if isinstance(result, tuple) else [result]

    first = run(0)
    for index in range(4):  # at least as many as any list of configurations
        for expected, found in zip(first, run(index), strict=True):
            assert torch.equal(expected, found), index
    assert max(chosen) <= 4
