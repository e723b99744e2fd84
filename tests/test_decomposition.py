"""Low-rank factors: the best approximation, and how close a random sketch comes to it."""

from __future__ import annotations

import pytest
import torch

from fastmerge import decomposition
from fastmerge.decomposition import low_rank_factors

from .samples import random, raw


def error(matrix, factors):
    down, up = (f.double() for f in factors)
    return float((matrix.double() - up @ down).norm())


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 7), (1, 9)], ids=str)
def test_full_rank_is_the_matrix(shape):
    matrix = random(shape, torch.float32, 1)
    for method in ("exact", "randomized"):
        down, up = low_rank_factors(matrix, min(shape), method=method)
        assert (down.shape, up.shape) == ((min(shape), shape[1]), (shape[0], min(shape)))
        torch.testing.assert_close(up @ down, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_exact_is_the_best_approximation(dtype):
    matrix = random((12, 9), dtype, 2)
    values = torch.linalg.svdvals(matrix.double())
    for rank in (1, 4, 8):
        down, up = low_rank_factors(matrix, rank, method="exact")
        assert down.dtype == up.dtype == dtype
        best = float(values[rank:].norm())
        rounding = 8 * torch.finfo(dtype).eps * float(matrix.double().norm())
        assert best - rounding <= error(matrix, (down, up)) <= best + rounding


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_the_sketch_comes_close_to_the_best(decay):
    """Singular values of a random matrix, then ever faster falling ones."""
    matrix = random((200, 300), torch.float32, 3)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / torch.arange(1.0, 201) ** decay
    matrix = (left * values) @ right
    for rank in (10, 20, 50):
        best = float(values[rank:].norm())
        found = error(matrix, low_rank_factors(matrix, rank, method="randomized"))
        assert found <= 1.01 * best
        assert found >= best * (1 - 1e-5)


def test_the_sketch_depends_on_its_seed_alone():
    matrix = random((60, 50), torch.float32, 4)
    torch.manual_seed(1)
    first = low_rank_factors(matrix, 5, method="randomized", seed=7)
    torch.manual_seed(2)
    again = low_rank_factors(matrix, 5, method="randomized", seed=7)
    other = low_rank_factors(matrix, 5, method="randomized", seed=8)
    assert [raw(f) for f in first] == [raw(f) for f in again]
    assert [raw(f) for f in first] != [raw(f) for f in other]
    signs = decomposition._random_signs(40, 25, 7, matrix)
    assert signs.abs().eq(1).all() and abs(float(signs.mean())) < 0.15
    assert abs(float((signs[1:] * signs[:-1]).mean())) < 0.15


def test_large_matrices_are_sketched(monkeypatch):
    monkeypatch.setattr(decomposition, "LARGE", 40)
    matrix = random((60, 50), torch.float32, 5)
    chosen = {rank: low_rank_factors(matrix, rank) for rank in (12, 13)}
    for rank, method in ((12, "randomized"), (13, "exact")):
        expected = low_rank_factors(matrix, rank, method=method)
        assert [raw(f) for f in chosen[rank]] == [raw(f) for f in expected]


@pytest.mark.parametrize(
    ("matrix", "rank", "method", "message"),
    [
        (torch.zeros(3, 4), 0, "auto", r"rank 0 of a matrix \[3, 4\], expected 1 to 3"),
        (torch.zeros(3, 4), 4, "auto", "rank 4"),
        (torch.zeros(3), 1, "auto", r"expected a matrix, got torch.float32 \[3\]"),
        (torch.zeros(3, 4, dtype=int), 1, "auto", "expected a matrix"),
        (torch.full((3, 4), float("nan")), 1, "auto", "not finite"),
        (torch.zeros(3, 4), 1, "best", "method must be one of auto, exact, randomized"),
    ],
)
def test_what_cannot_be_decomposed(matrix, rank, method, message):
    with pytest.raises(ValueError, match=message):
        low_rank_factors(matrix, rank, method=method)
