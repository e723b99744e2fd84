"""TALL masks and consensus merging against their formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmerge as fm

from .plain import make_experts


def _models(count=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).double()
    experts = make_experts(net, count, scale=0.3)
    for expert in experts:  # values on a grid, so that equalities happen
        for model in (net, expert):
            for parameter in model.parameters():
                parameter.data = (parameter.data * 8).round() / 8
    return net, experts


def _truth(net, experts, thresholds, merged=None):
    """{name: base}, {name: tau}, {name: masks [K, *]}."""
    base = net.state_dict()
    taus = {n: torch.stack([e.state_dict()[n] - base[n] for e in experts]) for n in base}
    unified = {n: t.sum(0) if merged is None else merged[n] - base[n] for n, t in taus.items()}
    masks = {
        n: torch.stack(
            [t.abs() > lam * (unified[n] - t).abs() for t, lam in zip(tau, thresholds, strict=True)]
        )
        for n, tau in taus.items()
    }
    return base, unified, masks


@pytest.mark.parametrize("threshold", [None, 0.25, [0.0, 0.5, 2.0]])
@pytest.mark.parametrize("ties", [False, True])
def test_tall_masks(threshold, ties):
    net, experts = _models()
    how = {"method": "ties", "density": 0.5, "scaling": 1.0} if ties else None
    merged = fm.merge(net.state_dict(), [e.state_dict() for e in experts], **how) if ties else None
    thresholds = threshold if isinstance(threshold, list) else [threshold or 0.4] * 3
    base, unified, masks = _truth(net, experts, thresholds, merged)
    options = {} if threshold is None else {"threshold": threshold}
    dynamic = fm.build(net, experts, method="tall", merged=how, **options)
    assert dynamic.thresholds == thresholds
    for k in range(3):
        for name, value in fm.fold(dynamic, k).items():
            assert torch.equal(value, base[name] + masks[name][k] * unified[name])


def test_thresholds_by_score():
    net, experts = _models()
    asked = []

    def score(model, task):
        asked.append(task)
        kept = int(model.bits()[model.tasks.index(task)])
        return -kept if task == "expert1" else kept  # fewest bits for one, most for the others

    dynamic = fm.build(net, experts, method="tall", score=score, candidates=(0.2, 0.3, 0.6))
    assert dynamic.thresholds == [0.2, 0.6, 0.2] and len(asked) == 9
    reference = fm.build(net, experts, method="tall", threshold=[0.2, 0.6, 0.2])
    for k in range(3):
        found, expected = fm.fold(dynamic, k), fm.fold(reference, k)
        assert all(torch.equal(found[n], expected[n]) for n in found)
    with pytest.raises(ValueError, match="threshold or score, got both"):
        fm.build(net, experts, method="tall", score=score, threshold=0.3)


def test_one_expert_is_itself():
    net, experts = _models(1)
    dynamic = fm.build(net, experts, method="tall")
    for name, value in fm.fold(dynamic, 0).items():
        assert torch.equal(value, experts[0].state_dict()[name])


@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("threshold", [0.25, [0.0, 0.5, 2.0]])
def test_consensus(k, threshold):
    net, experts = _models()
    thresholds = threshold if isinstance(threshold, list) else [threshold] * 3
    base, unified, masks = _truth(net, experts, thresholds)
    states = [e.state_dict() for e in experts]
    options = {"method": "consensus", "k": k, "threshold": threshold, "scaling": 0.5}
    found = fm.merge(net.state_dict(), states, **options)
    for name, value in found.items():
        kept = masks[name].sum(0) >= k
        assert torch.equal(value, base[name] + 0.5 * kept * unified[name])
    if k == 0:
        plain = fm.merge(net.state_dict(), states, method="task_arithmetic", scaling=0.5)
        assert all(torch.equal(found[n], plain[n]) for n in found)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 4}, "k is 4, but there are only 3 experts"),
        ({"k": -1}, "k must be a number of tasks"),
        ({"k": 1.5}, "k must be a number of tasks"),
        ({"threshold": -0.1}, "threshold must be"),
        ({"threshold": [0.1, 0.2]}, "threshold has 2 values for 3 experts"),
    ],
)
def test_wrong_parameters(options, message):
    net, experts = _models()
    states = [e.state_dict() for e in experts]
    with pytest.raises(ValueError, match=message):
        fm.merge(net.state_dict(), states, method="consensus", **options)
