"""`LinearizedModule`: the tangent of any module, checked against its Jacobian in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

import fastmerge as fm

from . import layouts
from .attached import Net, attached

X = torch.tensor([[1.0, -2, 3, 0, 2, -1], [0, 1, 1, -3, 2, 2]]).double()


def net():
    torch.manual_seed(0)
    return Net().double()


def drawn(module, seed, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(delta.shape, generator=generator).to(delta)
        for name, delta in module.state().items()
    }


def test_value_and_gradient_are_those_of_the_jacobian():
    plain = net()
    start = {n: p.detach() for n, p in plain.named_parameters()}
    jacobian = jacrev(lambda parameters: functional_call(plain, parameters, (X,)))(start)
    linear = fm.LinearizedModule(copy.deepcopy(plain))
    assert torch.equal(linear(X), plain(X))
    deltas = drawn(linear, 1)
    linear.load_state(deltas)
    moved = sum((jacobian[n].flatten(2) @ d.flatten()) for n, d in deltas.items())
    y = linear(X)
    torch.testing.assert_close(y, plain(X) + moved)
    assert (
        y - functional_call(plain, {n: start[n] + d for n, d in deltas.items()}, (X,))
    ).abs().max() > 0.01
    weights = torch.randn(y.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((y * weights).sum(), list(linear.deltas))
    for name, gradient in zip(linear.names, gradients, strict=True):
        expected = torch.einsum("bc,bc...->...", weights, jacobian[name])
        torch.testing.assert_close(gradient, expected)
    assert all(not p.requires_grad for p in linear.module.parameters())


def test_merging_is_linear_at_the_output_of_a_deep_module():
    linear = fm.LinearizedModule(net(), "up.*")
    assert linear.names == ["up.weight", "up.bias"]
    zero = linear(X).detach()
    states, outputs = [drawn(linear, seed) for seed in (1, 2)], []
    for state in states:
        linear.load_state(state)
        outputs.append(linear(X).detach())
    origin = {n: torch.zeros_like(t) for n, t in states[0].items()}
    linear.load_state(fm.merge(origin, states, method="task_arithmetic", scaling=0.75))
    torch.testing.assert_close(linear(X), zero + 0.75 * sum(y - zero for y in outputs))


def test_a_block_of_bert_with_adapters_in_it():
    model, inputs, _ = layouts.bert()
    adapters = fm.linearize(model, ["query", "value"], rank=2)
    before = layouts.outputs(model(**inputs))[0].detach()
    layers = model.get_submodule("encoder.layer")
    adapters.load_state(
        {n: 0.1 * torch.ones_like(t).cumsum(1) for n, t in adapters.state().items()}
    )  # the point around which the block is expanded
    around = layouts.outputs(model(**inputs))[0].detach()
    layers[1] = linear = fm.LinearizedModule(layers[1], "*.linearized.up")
    assert len(linear.names) == 2
    torch.testing.assert_close(layouts.outputs(model(**inputs))[0], around)
    hidden = torch.randn(2, 6, 16, dtype=torch.float64)

    def at(scale):
        linear.load_state({n: scale * d for n, d in state.items()})
        return layouts.outputs(linear(hidden))[0].detach()

    state = drawn(linear, 3, scale=1.0)
    zero, one, two = at(0), at(1), at(2)
    torch.testing.assert_close(two - zero, 2 * (one - zero), rtol=1e-9, atol=1e-11)
    assert (one - zero).abs().max() > 0.01 and not torch.equal(before, around)
    layouts.outputs(model(**inputs))[0].sin().sum().backward()
    assert all(d.grad is not None and bool(d.grad.any()) for d in linear.deltas)


def test_outputs_of_any_structure():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x, *, extra=None):
            y = (x * self.weight).square()
            return {"y": y, "best": y.argmax(-1), "same": (extra, None, "text")}

    linear = fm.LinearizedModule(Several())
    linear.load_state({"weight": torch.tensor([0.0, 1.0, 0.0])})
    found = linear(torch.tensor([[1.0, 2.0, 3.0]]), extra=torch.tensor([5]))
    assert found["y"].tolist() == [[1.0, 4.0 + 8.0, 9.0]] and found["best"].tolist() == [2]
    assert found["same"][0].item() == 5 and found["same"][1:] == (None, "text")


def test_it_trains_compiled_or_not():
    losses = []
    for compiled in (False, True):
        linear = fm.LinearizedModule(net())
        call = torch.compile(linear, backend="aot_eager") if compiled else linear
        optimizer = torch.optim.Adam(linear.deltas.parameters(), lr=0.02)
        losses.append([])
        for _ in range(5):
            loss = F.cross_entropy(call(X), torch.tensor([0, 2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
        assert losses[-1][-1] < 0.8 * losses[-1][0]
    torch.testing.assert_close(losses[0], losses[1])


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="no tensor name matches 'lora"):
        fm.LinearizedModule(net(), "lora*")
    with pytest.raises(ValueError, match="merged weights already"):
        fm.LinearizedModule(attached().net)
    linear = fm.LinearizedModule(net(), "up.*")
    with pytest.raises(ValueError, match=r"state misses 'up.weight'|state misses 'up.bias'"):
        linear.load_state({})
    with pytest.raises(ValueError, match=r"'up.bias' is \[1\], expected \[8\]"):
        linear.load_state(linear.state() | {"up.bias": torch.zeros(1)})
