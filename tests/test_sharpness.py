"""Sharpness-aware steps of `learn`, against SAM written out with plain autograd."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import fastmerge as fm
from fastmerge.learning_step import EagerStep
from fastmerge.objectives import Batch, kl_to_expert
from fastmerge.sharpness import SharpnessAwareStep

from .attached import attached
from .plain import built_call

SHARP = functools.partial(kl_to_expert, temperature=2.0)


def test_steps_are_those_of_sam_written_out():
    bundle = attached()
    expert = bundle.experts[0]
    target = expert(bundle.x).detach()

    def loss(values):
        def score(forward):
            logits = forward(bundle.x).double()
            cold, hot = (t.double() / 2 for t in (target, logits))
            p = cold.softmax(-1)
            return 4 * (p * (cold.log_softmax(-1) - hot.log_softmax(-1))).sum(-1).mean()

        return built_call(bundle.base, bundle.experts, values, score)

    expected = bundle.coefficients.raw.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([expected], lr=0.02)
    losses = []
    for _ in range(4):
        value = loss(expected)
        losses.append(float(value.detach()))
        gradient = torch.autograd.grad(value, expected)[0]
        moved = expected.detach() + 0.3 * gradient / gradient.norm()
        moved.requires_grad_()
        expected.grad = torch.autograd.grad(loss(moved), moved)[0]
        optimizer.step()
    asked = []

    def expert_logits(inputs):
        asked.append(len(inputs))
        return expert(inputs)

    history = fm.learn(
        bundle.net, bundle.coefficients, {"task": [bundle.x]}, objective=SHARP,
        expert_logits={"task": expert_logits}, steps=4, lr=0.02, sharpness=0.3,
    )  # fmt: skip
    torch.testing.assert_close(history.loss, losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bundle.coefficients.raw, expected, rtol=1e-3, atol=1e-4)
    assert asked == [5] * 4
    plain = attached()
    fm.learn(
        plain.net, plain.coefficients, {"task": [plain.x]}, objective=SHARP,
        expert_logits={"task": plain.experts[0]}, steps=4, lr=0.02,
    )  # fmt: skip
    assert (plain.coefficients.raw - expected).abs().max() > 1e-3


def test_coefficients_are_back_after_a_step_even_one_that_fails():
    bundle = attached()
    calls = []

    def objective(logits, batch):
        calls.append(bundle.coefficients.raw.detach().clone())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return logits.square().mean()

    parameters = [bundle.coefficients.raw]
    before = parameters[0].detach().clone()
    inner = EagerStep(bundle.net, parameters, {}, {}, objective)
    with pytest.raises(KeyboardInterrupt):
        SharpnessAwareStep(inner, parameters, 0.5)({"task": bundle.x}, 0)
    assert torch.equal(parameters[0], before)
    assert float((calls[1] - calls[0]).norm()) == pytest.approx(0.5)


def test_a_flat_loss_moves_nothing():
    bundle = attached()
    before = bundle.coefficients.raw.detach().clone()
    fm.learn(
        bundle.net, bundle.coefficients, {"task": [bundle.x]},
        objective=lambda logits, batch: 0 * logits.sum(), steps=2, sharpness=0.1,
    )  # fmt: skip
    assert torch.equal(bundle.coefficients.raw, before)


def test_temperature_of_the_divergence():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 3).unbind()
    batch = Batch("task", None, target)
    for t in (1.0, 2.0):
        expected = F.kl_div(
            (logits / t).log_softmax(-1), (target / t).softmax(-1), reduction="batchmean"
        )
        torch.testing.assert_close(kl_to_expert(logits, batch, t), t * t * expected)
    assert torch.equal(kl_to_expert(logits, batch), kl_to_expert(logits, batch, 1.0))


@pytest.mark.parametrize("sharpness", [-0.1, float("inf"), float("nan")])
def test_a_radius_that_is_none(sharpness):
    bundle = attached()
    with pytest.raises(ValueError, match="sharpness must be at least 0"):
        fm.learn(bundle.net, bundle.coefficients, {"t": [bundle.x]}, sharpness=sharpness)
