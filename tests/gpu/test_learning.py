"""Whole models on a GPU: gradients against built weights, CUDA graphs, compiled models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmerge as fm
from fastmerge.ops._strategy import use_strategy

from ..plain import built_call, make_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TASKS = ("a", "b", "c")


@pytest.fixture
def setting():
    torch.manual_seed(0)
    width = 256
    layers = [nn.Linear(64, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 32)]
    model = nn.Sequential(*layers).cuda().eval()
    experts = [e.cuda() for e in make_experts(model.cpu(), len(TASKS), scale=0.02)]
    model = model.cuda()
    generator = torch.Generator().manual_seed(1)
    data = {task: torch.randn(40, 64, generator=generator).cuda() for task in TASKS}
    return model, experts, data


@pytest.mark.parametrize("strategy", ["panel", "fused"])
def test_gradients_equal_built_weights(setting, strategy):
    model, experts, data = setting
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts)
    x = data["a"]

    def loss(forward):
        return forward(x).square().sum()

    with use_strategy(strategy):
        (ours,) = torch.autograd.grad(loss(model), [coefficients.raw])
    raw = coefficients.raw.detach().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(built_call(plain, experts, raw, loss), [raw])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_cuda_graph_learns_the_same(setting):
    model, experts, data = setting
    learned = []
    for cuda_graph in (False, True):
        net = copy.deepcopy(model)
        coefficients = fm.attach(net, experts)
        batches = {t: fm.ShuffledBatches(x.cpu(), 8, seed=1) for t, x in data.items()}
        batches = {t: [b.cuda() for b, _ in zip(s, range(20), strict=False)]
                   for t, s in batches.items()}  # fmt: skip
        history = fm.learn(net, coefficients, batches, steps=20, lr=1e-2, cuda_graph=cuda_graph)
        assert len(history.loss) == 20
        learned.append(coefficients.raw.detach().clone())
    assert (learned[0] - 0.3).abs().max() > 1e-2
    torch.testing.assert_close(learned[0], learned[1], rtol=0, atol=1e-5)


def test_compiled_model(setting):
    model, experts, data = setting
    coefficients = fm.attach(model, experts)
    x = data["a"]
    (eager,) = torch.autograd.grad(model(x).square().sum(), [coefficients.raw])
    compiled = torch.compile(model, fullgraph=True)
    (graph,) = torch.autograd.grad(compiled(x).square().sum(), [coefficients.raw])
    torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-3 * eager.abs().max().item())
