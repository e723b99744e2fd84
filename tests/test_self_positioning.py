"""Self Positioning: direction and length learned with any loss; the contrastive objective."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmerge as fm
from fastmerge.attachment import check_unattached
from fastmerge.objectives import Batch, info_nce

from .plain import make_experts


def setting():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    experts = dict(zip("ab", make_experts(base, 2, scale=0.3), strict=True))
    inputs = {task: torch.randn(16, 6) for task in experts}
    return base, experts, inputs


def test_it_starts_at_the_average_and_finds_a_known_position():
    base, experts, inputs = setting()
    goal = fm.merge(base, experts, coefficients=torch.tensor([0.9, 0.2]))

    def loss(outputs, batch):
        with torch.no_grad():
            target = goal(batch.inputs)
        return (outputs - target).square().mean()

    batches = {task: [x] for task, x in inputs.items()}
    start = copy.deepcopy(base)
    coefficients, _ = fm.self_position(start, experts, batches, loss, steps=1, lr=1e-12)
    assert coefficients.parametrization == "slerp" and coefficients.raw.shape == (1, 2)
    assert torch.allclose(coefficients.matrix(), torch.full((4, 2), 0.5), atol=1e-5)

    coefficients, history = fm.self_position(base, experts, batches, loss, steps=150, lr=3e-2)
    assert history.loss[-1] < 0.01 * history.loss[0]
    assert torch.allclose(coefficients.matrix()[0], torch.tensor([0.9, 0.2]), atol=0.02)
    fm.materialize(base)
    assert torch.allclose(base(inputs["a"]), goal(inputs["a"]), atol=0.02)


def test_a_failure_leaves_the_base_model():
    base, experts, inputs = setting()
    before = copy.deepcopy(base.state_dict())
    batches = {task: [x] for task, x in inputs.items()}
    with pytest.raises(FloatingPointError):
        fm.self_position(base, experts, batches, lambda y, batch: y.sum() * float("nan"))
    check_unattached(base)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_info_nce_is_its_formula():
    torch.manual_seed(1)
    outputs = torch.randn(10, 7)
    found = info_nce(0.1)(outputs, Batch("a", None))
    q, d = outputs[:5].double(), outputs[5:].double()
    cosines = (q @ d.T) / (q.norm(dim=1)[:, None] * d.norm(dim=1)[None])
    expected = -(cosines / 0.1).log_softmax(1).diagonal().mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="task 'a' has 9 rows"):
        info_nce()(outputs[:9], Batch("a", None))
    with pytest.raises(ValueError, match="temperature must be positive"):
        info_nce(0)
