"""The CPU kernels of packed masks at every instruction-set level and thread count."""

from __future__ import annotations

import pytest
import torch

from fastmerge import _native, use_backend
from fastmerge._native import cpu
from fastmerge.ops import elect
from fastmerge.ops._bits import mask_rows, pack_rows, packed_shape, unpack_rows

from .levels import same_everywhere
from .samples import grid, laid_out, make_deltas, random, raw

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.unavailable_reason())

SHAPES = [(0,), (1,), (15,), (17,), (8193,), (5, 7), (33, 264), (3, 8201), (300, 331)]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def unaligned(shape, dtype, value):
    memory = torch.full((shape.numel() + 1,), value, dtype=dtype)
    return memory[1:].view(shape)


@shapes
@pytest.mark.parametrize("count", [1, 8, 17])
def test_elect(shape, count):
    dtype = TYPES[count % 3]
    base = laid_out(random(shape, dtype, 1), "unaligned")
    deltas = make_deltas(base, count, dtype, True, "unaligned")

    def run():
        unified = unaligned(torch.Size(shape), dtype, float("nan"))
        masks = unaligned(torch.Size((count, *packed_shape(shape))), torch.uint8, 0xA5)
        sums = cpu.elect(base, deltas, unified, masks, mask_rows(shape), True)
        return unified, masks, sums

    unified, masks, sums = same_everywhere(run)
    with use_backend("reference"):
        expected = torch.ops.fastmerge.elect(deltas, base, True, None)
    assert raw(unified) == raw(expected[0]) and raw(masks) == raw(expected[1])
    torch.testing.assert_close(sums, expected[2], rtol=2.0**-20, atol=0)


def test_sums_do_not_lose_small_entries():
    """One large entry and many that fp32 would not add to it."""
    tau = torch.ones(100_000)
    tau[0] = 2.0**25
    found = elect([tau])
    assert found.magnitudes.flatten().tolist() == [2.0**25 + 99_999 - 31] * 2  # 31 share its lane


@shapes
@pytest.mark.parametrize("count", [0, 1, 8, 17])
def test_masked_combine(shape, count):
    """The sum, the products, and both in one call, which give the same bytes."""
    types = [TYPES[(count + shift) % 3] for shift in (0, 0, 1, 2)]
    base, unified, grad = (laid_out(random(shape, t, 1), "unaligned") for t in types[:3])
    bits = torch.stack([grid(shape, torch.float32, k) > 0 for k in range(max(1, count))])
    masks = pack_rows(bits).unbind()[:count]
    lam = random(count, torch.float32, 2).tolist()

    def run(base=base):
        room = [unaligned(torch.Size(shape), types[3], float("nan")) for _ in range(2)]
        sizes = mask_rows(shape)
        cpu.masked_combine(unified, masks, sizes, base=base, coefficients=lam, out=room[0])
        dots = cpu.masked_combine(unified, masks, sizes, grad=grad)
        both = cpu.masked_combine(
            unified, masks, sizes, base=base, coefficients=lam, grad=grad, out=room[1]
        )
        assert raw(room[0]) == raw(room[1]) and raw(dots) == raw(both)
        return room[0], dots

    for origin in (base, None):
        found, dots = same_everywhere(lambda origin=origin: run(origin))
        total = torch.zeros(shape) if origin is None else origin.float()
        for bit, value in zip(bits, lam, strict=False):
            total = torch.where(bit, total + value * unified.float(), total)
        assert torch.equal(found, total.to(types[3]))
        products = (grad.double() * unified.double()) * bits[:count]
        products = products.reshape(count, unified.numel())
        assert ((dots - products.sum(1)).abs() <= 2.0**-18 * products.abs().sum(1)).all()


def test_in_place_of_the_base():
    base, unified = random((9, 16), torch.float32, 1), random((9, 16), torch.float32, 2)
    bits = random((1, 9, 16), torch.float32, 3) > 0
    masks, expected = pack_rows(bits), torch.empty(9, 16)
    arguments = dict(base=base, coefficients=[0.5])
    cpu.masked_combine(unified, masks.unbind(), (9, 16), out=expected, **arguments)
    cpu.masked_combine(unified, masks.unbind(), (9, 16), out=base, **arguments)
    assert torch.equal(base, expected)
    assert torch.equal(unpack_rows(masks, (9, 16)), bits)
