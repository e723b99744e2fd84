"""Running statistics: recalibrated from batches, and given back."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import fastmerge as fm

from .layouts import resnet
from .plain import make_experts


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet()[0]


@pytest.fixture
def experts(model):
    """Experts whose own statistics differ from each other's."""
    experts = make_experts(model, 3, scale=0.2)
    for k, expert in enumerate(experts):
        update_bn([torch.randn(4, 3, 16, 16, dtype=torch.float64) + k], expert)
    return experts


def _statistics(model):
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n or "tracked" in n}


def _images(count, rows=4):
    return [2 * torch.randn(rows, 3, 16, 16, dtype=torch.float64) + 1 for _ in range(count)]


def _plain(model, experts, coefficients):
    """The merged model with ordinary weights."""
    return fm.merge(model, experts, coefficients=coefficients)


@pytest.mark.parametrize("materialized", [False, True])
def test_statistics_of_a_resnet_are_those_of_its_plain_twin(model, experts, materialized):
    base, before = copy.deepcopy(model), _statistics(model)
    coefficients = fm.attach(model, experts).double()
    with torch.no_grad():
        coefficients.raw.uniform_(0.1, 0.6)
    plain = _plain(base, experts, coefficients)
    averaged = _statistics(model)
    if materialized:
        fm.materialize(model)
    batches = _images(3)
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert fm.recalibrate(model, batches) is model
    update_bn(batches, plain)
    expected = _statistics(plain)
    for name, found in _statistics(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)
        assert "tracked" in name or not torch.allclose(found, averaged[name], rtol=1e-2)
    assert not any(module.training for module in model.modules())
    assert momenta == [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    plain.eval()
    torch.testing.assert_close(model(batches[0])[0], plain(batches[0])[0])
    fm.detach(model)
    assert all(torch.equal(v, before[n]) for n, v in _statistics(model).items())


def test_averaged_statistics_are_kept_and_restored_without_averaging_too(model, experts):
    before = _statistics(model)
    fm.attach(model, experts, running_statistics_from="base").double()
    assert all(torch.equal(v, before[n]) for n, v in _statistics(model).items())
    fm.recalibrate(model, _images(1))
    assert not any(torch.equal(v, before[n]) for n, v in _statistics(model).items())
    fm.detach(model)
    assert all(torch.equal(v, before[n]) for n, v in _statistics(model).items())


def test_tasks_are_joined_into_one_batch(model):
    plain = copy.deepcopy(model)
    one, two = _images(2), [batch + 3 for batch in _images(3, rows=2)]
    fm.recalibrate(model, {"one": one, "two": [{"pixel_values": b} for b in two]})
    apart = _statistics(model)
    fm.recalibrate(model, {"one": one, "two": itertools.cycle(two)})
    joined = _statistics(model)
    update_bn([torch.cat([a, b]) for a, b in zip(one, two, strict=False)], plain)
    for name, expected in _statistics(plain).items():
        torch.testing.assert_close(joined[name], expected)
        assert "tracked" in name or not torch.allclose(apart[name], expected)


def test_endless_batches_end_with_steps(model):
    plain = copy.deepcopy(model)
    inputs = torch.cat(_images(3))
    fm.recalibrate(model, fm.ShuffledBatches(inputs, batch_size=4, seed=1), steps=5)
    update_bn(itertools.islice(fm.ShuffledBatches(inputs, batch_size=4, seed=1), 5), plain)
    for name, expected in _statistics(plain).items():
        torch.testing.assert_close(_statistics(model)[name], expected)


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], ValueError, "no batch"),
        (
            [torch.full((4, 3, 16, 16), torch.nan)],
            FloatingPointError,
            "running_mean of '.*' is NaN",
        ),
        ([torch.zeros(4, 2, 16, 16)], ValueError, "channel"),
    ],
)
def test_failures_leave_the_statistics(model, batches, error, message):
    model.train()
    before = _statistics(model)
    with pytest.raises(error, match=message):
        fm.recalibrate(model, [batch.double() for batch in batches])
    assert all(torch.equal(v, before[n]) for n, v in _statistics(model).items())
    assert all(module.training for module in model.modules())
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_model_without_running_statistics(model):
    with pytest.raises(ValueError, match="no layer with running statistics"):
        fm.recalibrate(nn.Linear(2, 2), [torch.zeros(1, 2)])
