"""Numbers of chunks by importance, and going on from coarser coefficients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmerge as fm

from .plain import make_experts


@pytest.fixture
def attached():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 3), nn.Linear(3, 30, bias=False))
    experts = make_experts(model, 2)
    base = copy.deepcopy(model)
    coefficients = fm.attach(model, experts)
    with torch.no_grad():
        coefficients.raw.uniform_(0.1, 0.9)
    return model, base, experts, coefficients


@pytest.mark.parametrize("budget, exponent", [(20, 1.0), (20, 0.5), (12, 0.0), (10_000, 2.0)])
def test_counts_follow_the_formula(attached, budget, exponent):
    model, base, experts, coefficients = attached
    shapes = {n: p.shape for n, p in base.named_parameters() if p.dim() > 1}
    importance = {}
    for name in shapes:
        row = coefficients.raw.detach()[coefficients.names.index(name)].double()
        taus = [dict(e.named_parameters())[name] - dict(base.named_parameters())[name]
                for e in experts]  # fmt: skip
        importance[name] = sum(
            row[k].abs() * t.double().abs().mean() * t.numel() for k, t in enumerate(taus)
        ).item()
    total = sum(value**exponent for value in importance.values())
    expected = dict.fromkeys(coefficients.names, 1) | {
        n: min(shapes[n][0], max(1, int(budget * importance[n] ** exponent / total)))
        for n in shapes
    }
    assert fm.important_chunks(model, budget, exponent=exponent) == expected
    assert budget != 20 or len(set(expected.values())) > 2


def test_finer_coefficients_start_where_the_coarser_ended(attached):
    model, _, experts, coefficients = attached
    x = torch.randn(4, 6)
    y = model(x)
    chunks = fm.important_chunks(model, 30)
    fm.detach(model)
    finer = fm.attach(model, experts, granularity="chunk", chunks=chunks, init=coefficients)
    assert len(finer.labels) == sum(chunks.values()) > len(coefficients.labels)
    torch.testing.assert_close(model(x), y)
    again = fm.important_chunks(model, 30)
    assert again == chunks


def test_bad_arguments(attached):
    model, base, _, coefficients = attached
    for budget, exponent in ((0, 1.0), (5, -1.0)):
        with pytest.raises(ValueError, match="budget must be positive"):
            fm.important_chunks(model, budget, exponent=exponent)
    with pytest.raises(ValueError, match="no merged weights"):
        fm.important_chunks(base, 5)
    with torch.no_grad():
        coefficients.raw.zero_()
    assert set(fm.important_chunks(model, 5).values()) == {1}
