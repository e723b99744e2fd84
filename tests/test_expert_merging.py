"""Expert Merging: experts' hidden states and predictions, coefficients held to their start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastmerge as fm
from fastmerge.objectives import Batch, features_and_kl, kl_to_expert

from .attached import attached
from .plain import built_call


def outputs(seed):
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))


def test_the_objective_is_the_sum_of_both():
    made, expert = outputs(1), outputs(2)
    found = features_and_kl(3, temperature=2.0, weight=0.5)(made, Batch("task", None, expert))
    divergence = kl_to_expert(made[:, 4:], Batch("task", None, expert[:, 4:]), 2.0)
    expected = divergence + 0.5 * (made[:, :4] - expert[:, :4]).square().mean()
    torch.testing.assert_close(found, expected)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        features_and_kl(0)
    with pytest.raises(ValueError, match="'task' has outputs of 7 entries, expected hidden states"):
        features_and_kl(7)(outputs(1), Batch("task", None, outputs(2)))
    with pytest.raises(ValueError, match="needs expert_logits for task 'task'"):
        features_and_kl(3)(outputs(1), Batch("task", None))
    with pytest.raises(ValueError, match=r"shape \[2, 7\], expected \[4, 7\]"):
        features_and_kl(3)(outputs(1), Batch("task", None, outputs(2)[:2]))
    bundle = attached()
    with pytest.raises(ValueError, match="anchor must be at least 0, got -1"):
        fm.learn(bundle.net, bundle.coefficients, {"t": [bundle.x]}, anchor=-1)


def test_anchored_steps_are_those_written_out():
    bundle = attached()
    expected = bundle.coefficients.raw.detach().clone().requires_grad_()
    start = expected.detach().clone()
    optimizer = torch.optim.SGD([expected], lr=0.01)
    for _ in range(3):
        loss = built_call(
            bundle.base, bundle.experts, expected, lambda forward: forward(bundle.x).square().mean()
        )
        optimizer.zero_grad()
        (loss + 2.0 * (expected - start).abs().mean()).backward()
        optimizer.step()
    history = fm.learn(
        bundle.net, bundle.coefficients, {"task": [bundle.x]},
        objective=lambda logits, batch: logits.square().mean(), steps=3, anchor=2.0,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    )  # fmt: skip
    torch.testing.assert_close(bundle.coefficients.raw, expected, rtol=1e-4, atol=1e-6)
    assert history.loss[-1] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert (2.0 / expected.numel() * 0.01) > 1e-5  # the anchor's part can be seen


def test_chunks_learn_an_experts_hidden_states_and_predictions():
    bundle = attached()
    fm.detach(bundle.net)
    expert = bundle.experts[1]

    def both(net):
        hidden = F.gelu(net.norm(net.up(bundle.x)))
        return torch.cat([hidden, net.down(hidden)], -1)

    class Wide(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return both(self.net)

    coefficients = fm.attach(
        bundle.net, bundle.experts, granularity="chunk", chunks=2, init=0.3, clamp=None
    )
    assert coefficients.matrix().shape[0] > len(coefficients.names)
    history = fm.learn(
        Wide(bundle.net), coefficients, {"task": [bundle.x]}, objective=features_and_kl(3, 2.0),
        expert_logits={"task": Wide(expert)}, steps=60, lr=0.05, anchor=1e-4,
    )  # fmt: skip
    assert history.loss[-1] < 0.1 * history.loss[0]
