"""Forward passes: what merged weights compute once in them, and when they must not."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmerge as fm
from fastmerge.forward_pass import running

from .attached import Net, attached, loss_of
from .plain import make_experts
from .samples import raw

weighted_sum = importlib.import_module("fastmerge.ops.weighted_sum")


@pytest.fixture
def it():
    return attached()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many tensors every call of the kernel of weighted sums has combined."""
    if not fm._native.available():
        pytest.skip("counts calls of the native kernel")
    counts = []
    kernels = weighted_sum.native_kernels("weighted_sum", torch.zeros(1))
    kernel = kernels.weighted_sum

    def counted(bases, *others):
        if bases[0].dim() == 1:
            counts.append(len(bases))
        return kernel(bases, *others)

    monkeypatch.setattr(kernels, "weighted_sum", counted)
    return counts


def gradient(it, y: Tensor) -> Tensor:
    return torch.autograd.grad(loss_of(y), it.coefficients.raw)[0]


def test_small_weights_are_combined_in_one_call(it, calls):
    y = it.net(it.x)
    assert calls == [4]  # three biases and the norm's weight
    assert it.net.norm.weight.uses["built"] == 1
    alone = it.net.down(F.gelu(it.net.norm(it.net.up(it.x))))
    assert calls == [4, 1, 1, 1, 1]
    assert raw(y.detach()) == raw(alone.detach())
    torch.testing.assert_close(gradient(it, y), gradient(it, alone))
    with torch.no_grad():
        assert raw(it.net(it.x)) == raw(alone.detach())


@pytest.mark.parametrize("parametrization", ["identity", "softmax", "tanh", "slerp"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_all_rows_are_the_rows(parametrization, granularity):
    net = Net()
    coefficients = fm.attach(
        net, make_experts(net, 3), parametrization=parametrization, granularity=granularity
    )
    with torch.no_grad():
        coefficients.raw.add_(0.3 * torch.rand(coefficients.raw.shape))
    every = coefficients.all_rows()
    single = [coefficients.row(i) for i in range(len(every))]
    torch.testing.assert_close(torch.stack(every), torch.stack(single), rtol=0, atol=1e-7)
    ours, theirs = (
        torch.autograd.grad(torch.stack(rows).square().sum(), coefficients.raw)
        for rows in (every, single)
    )
    torch.testing.assert_close(ours, theirs)


def test_passes_have_graphs_of_their_own(it):
    first, second = it.net(it.x), it.net(it.x)
    assert it.learns(first) and it.learns(second)
    assert it.learns() and it.learns()


def test_coefficients_changed_within_a_pass(it):
    def change(*_):
        with torch.no_grad():
            it.coefficients.raw.add_(0.1)

    hook = it.net.up.register_forward_hook(change)
    before = it.coefficients.raw.detach().clone()
    with torch.no_grad():
        y = it.net(it.x)
    hook.remove()
    built = it.built()
    it.coefficients.raw.data.copy_(before)
    up = F.linear(it.x, it.built()["up.weight"], it.built()["up.bias"])
    norm = F.layer_norm(up, (8,), built["norm.weight"], built["norm.bias"])
    expected = F.linear(F.gelu(norm), built["down.weight"], built["down.bias"])
    torch.testing.assert_close(y, expected)


class Scaled(nn.Module):
    """Uses its scale twice, and writes to what it has of it in between."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.scale.view(1, -1)
        kept.mul_(2)
        return x * self.scale + kept


@pytest.mark.parametrize("grad", [True, False])
def test_written_copies_are_not_used_again(grad):
    net = Scaled()
    coefficients = fm.attach(net, make_experts(net, 2))
    scale = net.scale.combined().detach()
    x = torch.randn(3, 6)
    if not grad:
        with torch.no_grad(), pytest.raises(RuntimeError, match="inference tensor"):
            net(x)
        return
    y = net(x)
    torch.testing.assert_close(y.detach(), x * scale + 2 * scale)
    y.sum().backward()
    assert coefficients.raw.grad.abs().min() > 0


class Checkpointed(nn.Module):
    """Computes a part again in the backward pass."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.first, self.inner = nn.LayerNorm(6), inner

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        x = self.first(x)
        return checkpoint(self.inner, x, use_reentrant=False) if again else self.inner(x)


@pytest.mark.parametrize("clamp", [None, (0.0, 1.0)])
def test_checkpointing_within_a_pass(clamp):
    net = Checkpointed(Net())
    coefficients = fm.attach(net, make_experts(net, 2), clamp=clamp)
    x = torch.randn(5, 6)
    expected, found = (
        torch.autograd.grad(loss_of(net(x, again)), coefficients.raw)[0] for again in (False, True)
    )
    torch.testing.assert_close(found, expected)


def test_a_pass_ends_with_the_model_s_call(it):
    seen = []
    hook = it.net.norm.register_forward_hook(lambda *_: seen.append(running(it.coefficients)))
    it.net(it.x)
    with pytest.raises(RuntimeError, match=r"expected \[\.\.\., 6\]"):
        it.net(torch.ones(2, 7))
    assert running(it.coefficients) is None and seen[0] is not None
    hook.remove()
    copied = copy.deepcopy(it.net)
    assert torch.equal(copied(it.x), it.net(it.x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_without_merged_weights_keep_no_hooks(it):
    fm.materialize(it.net)
    assert not it.net._forward_hooks and not it.net._forward_pre_hooks
    torch.testing.assert_close(torch.jit.script(it.net)(it.x), it.net(it.x))
    fm.detach(it.net)
    fm.attach(it.net, it.experts)
    fm.detach(it.net)
    assert not it.net._forward_hooks and not it.net._forward_hooks_always_called


def test_weights_that_no_pass_uses_may_be_broken():
    net = Net()
    experts = make_experts(net, 2)
    net.unused, experts[0].unused, experts[1].unused = (nn.LayerNorm(3) for _ in range(3))
    with torch.no_grad():
        experts[0].unused.weight.fill_(torch.nan)
    coefficients = fm.attach(net, experts, granularity="task", allow_nonfinite=True)
    loss_of(net(torch.randn(5, 6))).backward()
    assert torch.isfinite(coefficients.raw.grad).all()
