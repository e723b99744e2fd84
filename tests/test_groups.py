"""Rows of activations grouped by equal row coefficients."""

from __future__ import annotations

import pytest
import torch

from fastmerge.ops._groups import group_rows, row_indices


def test_equal_rows_share_a_group_in_order_of_appearance():
    lam = torch.tensor([[2.0, 0.0], [1.0, 1.0], [2.0, -0.0], [0.5, 3.0], [1.0, 1.0]])
    groups = group_rows(lam.view(5, 1, 2), (5, 3))
    assert groups.coefficients.tolist() == [[2.0, 0.0], [1.0, 1.0], [0.5, 3.0]]
    assert groups.sizes == [6, 6, 3] and groups.spans() == [(0, 6), (6, 12), (12, 15)]
    x = torch.arange(15).view(15, 1)
    gathered = groups.gather(x)
    assert gathered.flatten().tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 12, 13, 14, 9, 10, 11]
    assert torch.equal(groups.scatter(gathered), x)


def test_rows_in_order_are_not_copied():
    groups = group_rows(torch.tensor([[[1.0]], [[1.0]], [[0.0]]]), (3, 2))
    x = torch.randn(6, 4)
    assert groups.sizes == [4, 2] and groups.order is None
    assert groups.gather(x) is x and groups.scatter(x) is x


def test_rows_kept_apart():
    groups = group_rows(torch.ones(3, 1, 2), (3, 4), join_equal=False)
    assert groups.sizes == [4, 4, 4] and groups.order is None
    assert torch.equal(groups.coefficients, torch.ones(3, 2))


def test_nan_equals_nothing():
    lam = torch.full((3, 1), float("nan"))
    assert group_rows(lam, (3,)).sizes == [1, 1, 1]


@pytest.mark.parametrize(
    ("own", "lead", "expected"),
    [
        ((), (2, 2), [0, 0, 0, 0]),
        ((3,), (2, 3), [0, 1, 2, 0, 1, 2]),
        ((2, 1), (2, 3), [0, 0, 0, 1, 1, 1]),
        ((1, 3), (2, 3), [0, 1, 2, 0, 1, 2]),
        ((), (), [0]),
        ((2, 1), (2, 0), []),
        ((0, 1), (0, 3), []),
    ],
    ids=str,
)
def test_broadcast(own, lead, expected):
    lam = torch.arange(2.0 * max(1, torch.Size(own).numel())).view(-1, 2)
    lam = lam[: torch.Size(own).numel()].view(*own, 2)
    assert row_indices(lam, lead).tolist() == expected
    groups = group_rows(lam, lead)
    assert sum(groups.sizes) == len(expected) and 0 not in groups.sizes
    if expected:
        per_row = torch.cat(
            [c.expand(n, 2) for c, n in zip(groups.coefficients, groups.sizes, strict=True)]
        )
        assert torch.equal(groups.scatter(per_row), lam.expand(*lead, 2).reshape(-1, 2))
