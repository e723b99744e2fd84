"""magnitude_masks and random_masks: exact selections, and draws as good as independent ones."""

from __future__ import annotations

import math

import pytest
import torch

from fastmerge import use_backend
from fastmerge.ops import magnitude_masks, random_key, random_masks, tie_counts
from fastmerge.ops._bits import pack_bits, unpack_bits
from fastmerge.ops.random_masks import draws, philox

from .samples import LAYOUTS, SIZES, assert_same_bytes_for_threads, grid, laid_out, random, raw


@pytest.mark.parametrize("size", SIZES)
def test_bits_pack_and_unpack(size):
    mask = random(size, torch.float32, 1) > 0
    packed = pack_bits(mask)
    assert packed.shape == ((size + 7) // 8,)
    assert torch.equal(unpack_bits(packed, size), mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_magnitude_masks(backend, size, layout):
    base = laid_out(grid(size, torch.bfloat16, 1), layout)
    deltas = [laid_out(grid(size, torch.float32, 2 + k), layout) for k in range(3)]
    offset = 1000
    values = torch.tensor([[math.inf, 0.25], [0.5, 0.25], [0.25, 0.0]])
    indices = torch.tensor([[0, 1100], [1050, 1001], [5000, 3000]])
    masks = unpack_bits(magnitude_masks(deltas, values, indices, base=base, offset=offset), size)
    index = torch.arange(size) + offset
    for delta, mask, (c1, c0), (i1, i0) in zip(deltas, masks, values, indices, strict=True):
        tau = (delta - base.float()).abs()
        upper = (tau > c1) | ((tau == c1) & (index < i1))
        lower = (tau > c0) | ((tau == c0) & (index < i0))
        assert torch.equal(mask, lower & ~upper)


@pytest.mark.parametrize(("width", "bins"), [(1, 40), (7, 1000), (3, 10)])
def test_tie_counts(backend, width, bins):
    size, offset = 1003, 500
    base = grid(size, torch.bfloat16, 1)
    deltas = [grid(size, torch.float32, 2 + k) for k in range(3)]
    values, starts = torch.tensor([0.25, 0.0, 9.0]), torch.tensor([0, 517, 900])
    found = tie_counts(deltas, values, starts, width=width, bins=bins, base=base, offset=offset)
    for delta, value, start, row in zip(deltas, values, starts, found, strict=True):
        equal = ((delta - base.float()).abs() == value).nonzero().squeeze(1) + offset
        expected = [
            int(((equal >= start + b * width) & (equal < start + (b + 1) * width)).sum())
            for b in range(bins)
        ]
        assert row.tolist() == expected
    assert found[1].sum() > 0


def test_nan_is_above_no_cut(backend):
    tau = torch.tensor([math.nan, math.inf, 1.0, -0.0])
    cuts = torch.tensor([[math.inf, 0.0]]), torch.tensor([[0, 9]])
    assert unpack_bits(magnitude_masks([tau], *cuts), 4).tolist() == [[False, True, True, True]]


def test_philox_gives_the_published_words():
    """Known answers of the Random123 distribution."""
    low = (1 << 32) - 1
    expected = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert tuple(int(w) for w in philox(torch.tensor(0), 0, 0, 0)) == expected
    expected = (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert tuple(int(w) for w in philox(torch.tensor(-1), low, low, -1)) == expected
    counter, key = 0x85A308D3243F6A88, 0x299F31D0A4093822
    expected = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    counter -= 1 << 64
    assert (
        tuple(int(w) for w in philox(torch.tensor(counter), 0x13198A2E, 0x03707344, key))
        == expected
    )


def test_draws_are_the_words_of_the_counters():
    key = random_key(7, "w")
    found = draws(200, 0, 3, key, "cpu").tolist()
    for entry in (0, 5, 9, 34, 63, 64, 130):
        counter = torch.tensor(entry // 64 * 8 + entry % 32 // 4)
        half = entry // 32 % 2 * 4 + entry % 4
        high, low = (
            int(philox(counter, 3, s, key)[half // 2]) >> 16 * (half % 2) & 0xFFFF for s in (0, 1)
        )
        assert found[entry] == high << 16 | low


@pytest.mark.parametrize("probability", [0.0, 1e-5, 0.2, 0.5, 1 - 2**-32, 1.0])
@pytest.mark.parametrize("offset", [0, 1, 63, 64, 8191, (1 << 33) + 5])
def test_equal_probabilities(backend, offset, probability):
    size, key = 3001, random_key(1, "x")
    masks = random_masks(
        [torch.empty(size)] * 2,
        torch.full((2, 2), probability, dtype=torch.float64),
        key=key,
        offset=offset,
    )
    for k, mask in enumerate(unpack_bits(masks, size)):
        expected = draws(size, offset, k, key, "cpu") < int(probability * 2**32)
        assert torch.equal(mask, expected)


def test_a_draw_that_equals_the_high_bits_is_decided_by_the_low_ones(backend):
    """A threshold beside one entry's draw, in a group where the first 16 bits are equal."""
    key, size = random_key(2, "x"), 640
    u = draws(size, 0, 0, key, "cpu")
    for entry in (0, 77, 639):
        for above in (0, 1):
            p = torch.tensor([[(int(u[entry]) + above) / 2**32] * 2], dtype=torch.float64)
            mask = unpack_bits(random_masks([torch.empty(size)], p, key=key), size)[0]
            assert torch.equal(mask, u < int(u[entry]) + above)


@pytest.mark.parametrize("kind", ["random", "grid", "zero", "one large", "nan"])
@pytest.mark.parametrize("width", [1, 2, 17, 96, 1000])
def test_probabilities_by_rank(backend, width, kind):
    rows, offset, key = 24, 12_345, random_key(3, "x")
    make = grid if kind == "grid" else random
    tau = make((rows, width), torch.float32, 5)
    if kind == "zero":
        tau.zero_()
    if kind == "one large":
        tau[:, 0] = 1e30
    if kind == "nan":
        tau[3, width // 2] = math.nan
    low, high = 0.1, 0.8
    probabilities = torch.tensor([[low, high]], dtype=torch.float64)
    masks = random_masks([tau], probabilities, key=key, offset=offset)
    order = tau.abs().argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(width).expand_as(order))
    share = rank / (width - 1) if width > 1 else rank + 0.5
    u = draws(tau.numel(), offset, 0, key, "cpu").view(tau.shape)
    expected = u.double() / 2**32 < low + (high - low) * share.double()
    found = unpack_bits(masks[0], tau.numel()).view(tau.shape)
    assert torch.equal(found, expected)


def test_blocks_and_threads_have_the_bytes_of_the_whole():
    tau = random((600, 331), torch.bfloat16, 1)
    probabilities = torch.tensor([[0.2, 0.2], [0.1, 0.5]], dtype=torch.float64)
    base = random((600, 331), torch.bfloat16, 2)

    def run():
        return (random_masks([tau, tau], probabilities, key=9, base=base),)

    assert_same_bytes_for_threads(run)
    whole = unpack_bits(run()[0], tau.numel())
    for start in (0, 1, 77, 599):
        part = slice(start, start + 100)
        masks = random_masks(
            [tau[part]] * 2, probabilities, key=9, base=base[part], offset=start * 331
        )
        size = tau[part].numel()
        found = unpack_bits(masks, size)
        assert torch.equal(found, whole[:, start * 331 : start * 331 + size])


def uniform(expert=0, key=None, offset=0, size=1 << 17):
    key = random_key(0, "layers.0.weight") if key is None else key
    return (draws(size, offset, expert, key, "cpu").double() + 0.5) / 2**32


def test_draws_have_the_moments_of_a_uniform_distribution():
    for expert, key in (
        (0, None),
        (3, None),
        (0, random_key(1, "layers.0.weight")),
        (0, 0),
        (0, 1),
    ):
        u = uniform(expert, key)
        n = len(u)
        assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
        assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)


def test_draws_fill_bins_evenly():
    every = draws(1 << 18, 0, 0, random_key(0, "w"), "cpu")
    for bits in (4, 8, 12):
        bins = 1 << bits
        for shift in (0, 16, 32 - bits):  # low, middle and high bits
            values = every >> shift & (bins - 1)
            counts = torch.bincount(values, minlength=bins).double()
            expected = counts.sum() / bins
            chi = float(((counts - expected) ** 2 / expected).sum())
            assert abs(chi - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1)), (bits, shift, chi)


def test_draws_of_experts_tensors_seeds_and_neighbours_are_uncorrelated():
    one = uniform()
    others = [
        uniform(expert=1),
        uniform(key=random_key(0, "layers.1.weight")),
        uniform(key=random_key(1, "layers.0.weight")),
        *(uniform(offset=lag) for lag in (1, 2, 7, 8, 63, 64, 512)),
        uniform(offset=1 << 32),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(len(one))


def test_runs_of_kept_entries_have_geometric_lengths():
    p = 0.3
    kept = (uniform() < p).long()
    starts = ((kept[1:] == 1) & (kept[:-1] == 0)).sum()
    n = len(kept)
    assert abs(starts - n * p * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))


def test_native_equals_the_reference():
    if_native = random((50, 321), torch.bfloat16, 1)
    probabilities = torch.tensor([[0.2, 0.2], [0.1, 0.5]], dtype=torch.float64)
    found = []
    for name in ("reference", "native"):
        with use_backend(name):
            found.append(raw(random_masks([if_native] * 2, probabilities, key=-9, offset=11)))
    assert found[0] == found[1]
