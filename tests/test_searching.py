"""`search`: coefficients by evaluations alone, on merged weights, written weights and adapters."""

from __future__ import annotations

import math

import pytest
import torch

import fastmerge as fm
from fastmerge.searching import BOUNDS

from .attached import attached
from .test_linearized import X, two_experts


def distance(coefficients, target):
    return lambda: (coefficients.matrix() - target).square().sum()


def made(**options):
    """A net attached with options, and its coefficients and input."""
    bundle = attached()
    fm.detach(bundle.net)
    coefficients = fm.attach(bundle.net, bundle.experts, **({"granularity": "task"} | options))
    return bundle.net, coefficients, bundle.x


def test_a_known_minimum_is_found():
    net, coefficients, _ = made(clamp=None)
    target = torch.tensor([-0.4, 1.1])
    history = fm.search(net, coefficients, distance(coefficients, target), evaluations=150, l1=0)
    torch.testing.assert_close(coefficients.matrix()[0], target, atol=1e-2, rtol=0)
    assert len(history.objectives) == 150
    assert history.objective == min(history.objectives) == history.loss
    assert history.loss == float(distance(coefficients, target)())


def test_the_regulariser_is_the_papers_or_the_codes():
    for norm, share in (("sum", 1.0), ("mean", 0.5)):
        net, coefficients, _ = made(init=[0.3, -0.5], clamp=None)
        history = fm.search(net, coefficients, lambda: 2.0, evaluations=1, l1=0.1, norm=norm)
        assert history.loss == 2 and history.objective == pytest.approx(2 + 0.08 * share)
    net, coefficients, _ = made(granularity="layer", init=[0.3, 0.5])
    history = fm.search(net, coefficients, lambda: 0.0, evaluations=1, l1=1.0)
    assert history.objective == pytest.approx(0.8)  # a mean over the tensors


def test_an_expert_that_does_not_help_is_driven_to_nothing():
    net, coefficients, _ = made(clamp=None, init=0.5)
    loss = lambda: (coefficients.matrix()[0, 0] - 0.6).square()  # noqa: E731
    fm.search(net, coefficients, loss, evaluations=200, l1=0.05)
    first, second = coefficients.matrix()[0].tolist()
    assert first == pytest.approx(0.575, abs=0.02) and abs(second) < 0.02  # 0.6 - l1 / 2


def test_the_seed_decides():
    found = []
    for seed in (0, 0, 1):
        net, coefficients, x = made(granularity="layer")
        fm.search(net, coefficients, lambda: net(x).square().sum(), evaluations=10, seed=seed)  # noqa: B023
        found.append(coefficients.matrix())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_written_weights_follow_and_hold_the_best():
    losses, found = [], []
    for written in (False, True):
        net, coefficients, x = made()
        if written:
            fm.materialize(net)
        loss = lambda: net(x).square().sum()  # noqa: B023, E731
        history = fm.search(net, coefficients, loss, evaluations=30)
        assert history.objective < history.objectives[0]
        assert float(loss().detach()) == history.loss
        losses.append(history.objectives)
        found.append(coefficients.matrix())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(found[0], found[1])


def test_adapters_are_searched_as_lorahub_does(tmp_path):
    _, adapters, _, paths = two_experts(tmp_path)
    target = adapters.load(paths[1]).model.up(X.double()).detach()
    base = adapters.remove()
    coefficients = fm.attach(base, paths, deltas="lora", granularity="task", init=0.0, clamp=None)
    fm.search(base, coefficients, lambda: (base.up(X.double()) - target).square().mean(),
              evaluations=200, l1=1e-3)  # fmt: skip
    first, second = coefficients.matrix()[0].tolist()
    assert abs(first) < 0.1 and second == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("options", "bounds", "low", "high"),
    [
        (dict(), None, 0.0, 1.0),
        (dict(clamp=None), None, *BOUNDS),
        (dict(clamp=None), (0.2, 0.4), 0.2, 0.4),
        (dict(parametrization="softmax"), None, -math.inf, math.inf),
    ],
)
def test_values_stay_within_bounds(options, bounds, low, high):
    net, coefficients, _ = made(**options)
    seen = []

    def loss():
        seen.append(coefficients.raw.detach().clone())
        return 0.0

    fm.search(net, coefficients, loss, evaluations=20, l1=0, step=3.0, bounds=bounds)
    values = torch.stack(seen[1:])
    assert values.min() >= low and values.max() <= high
    if math.isfinite(low):
        assert values.min() == pytest.approx(low) and values.max() == pytest.approx(high)
    else:
        assert values.abs().max() > 2


def test_losses_that_are_not_numbers():
    net, coefficients, _ = made()
    values = iter([1.0, math.nan, 0.5, math.inf, -math.inf])
    history = fm.search(net, coefficients, lambda: next(values), evaluations=5, l1=0)
    assert history.objectives == [1.0, math.inf, 0.5, math.inf, math.inf]
    assert history.loss == 0.5
    with pytest.raises(FloatingPointError, match="loss at the start is nan"):
        fm.search(net, coefficients, lambda: math.nan)


def test_an_interrupted_search_leaves_the_best():
    net, coefficients, _ = made()
    seen = []

    def loss():
        seen.append(coefficients.raw.detach().clone())
        if len(seen) == 4:
            raise KeyboardInterrupt
        return [3.0, 1.0, 2.0][len(seen) - 1]

    with pytest.raises(KeyboardInterrupt):
        fm.search(net, coefficients, loss, l1=0)
    assert torch.equal(coefficients.raw, seen[1]) and not coefficients.raw.equal(seen[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(evaluations=0), "expected evaluations >= 1"),
        (dict(l1=-1), "l1 >= 0"),
        (dict(step=0), "step > 0"),
        (dict(norm="max"), "norm must be 'sum' or 'mean', got 'max'"),
        (dict(bounds=(1, 0)), "bounds must be"),
        (dict(coefficients=None), "not those that attach returned"),
    ],
)
def test_bad_arguments(options, message):
    net, coefficients, _ = made()
    before = coefficients.raw.detach().clone()
    if "coefficients" in options:
        coefficients = made()[1]
        options = {}
    with pytest.raises(ValueError, match=message):
        fm.search(net, coefficients, lambda: 0.0, **options)
    assert torch.equal(before, coefficients.raw)
