"""attach, detach, materialize, remerge_: values, rules and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmerge as fm
from fastmerge import merged_functions
from fastmerge.merged_weight import MergedWeight

from .plain import built_weights, make_experts


class _Net(nn.Module):
    """Tied weights, a norm with running statistics, an integer buffer, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.layer.bias.requires_grad_(False)
        self.register_buffer("positions", torch.arange(5))

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(self.norm(self.layer(x).flatten(0, 1)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return _Net().eval()


@pytest.fixture
def experts(net):
    experts = make_experts(net, 3)
    for k, expert in enumerate(experts):
        expert.norm.running_mean.fill_(float(k))
        expert.norm.running_var.fill_(1.0 + k)
        expert.positions.add_(k)
    return experts


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_attach_and_detach_leave_no_trace(net, experts):
    originals = dict(net.named_parameters(remove_duplicate=False))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    expected = net(IDS)
    coefficients = fm.attach(net, experts, init=0.5)
    assert net.embedding.weight.base is net.head.weight.base
    assert isinstance(net.layer.weight, MergedWeight)
    assert isinstance(net.layer.weight, nn.Parameter)
    assert coefficients.names == [
        "embedding.weight",
        "layer.weight",
        "layer.bias",
        "norm.weight",
        "norm.bias",
    ]
    assert not torch.allclose(net(IDS), expected)
    assert torch.equal(net.norm.running_mean, torch.ones(6))
    assert torch.equal(net.norm.running_var, torch.full((6,), 2.0))
    fm.detach(net)
    restored = dict(net.named_parameters(remove_duplicate=False))
    assert all(restored[name] is p for name, p in originals.items())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(net(IDS), expected)
    with pytest.raises(ValueError, match=r"fastmerge\.attach first"):
        fm.detach(net)


def test_initial_zero_is_the_base_model(net, experts):
    expected = net(IDS)
    fm.attach(net, experts, init=0.0, running_statistics_from="base")
    torch.testing.assert_close(net(IDS), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("deltas", ["experts", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_materialize_equals_merge(net, experts, deltas, dtype):
    net, experts = net.to(dtype), [e.to(dtype) for e in experts]
    base = copy.deepcopy(net)
    coefficients = fm.attach(net, experts, deltas=deltas)
    with torch.no_grad():
        coefficients.raw.copy_(torch.rand(5, 3))
    merged_output = net(IDS)
    fm.materialize(net)
    assert type(net.layer.weight) is nn.Parameter and net.embedding.weight is net.head.weight
    assert net.layer.weight.requires_grad and not net.layer.bias.requires_grad
    torch.testing.assert_close(net(IDS), merged_output)
    if deltas == "experts":
        expected = fm.merge(base, experts, coefficients=coefficients)
        for name, value in expected.state_dict().items():
            assert torch.equal(value, net.state_dict()[name]), name


def test_remerge_writes_in_place(net, experts):
    coefficients = fm.attach(net, experts, init=0.1)
    with pytest.raises(ValueError, match="materialize"):
        fm.remerge_(net, coefficients)
    fm.materialize(net)
    pointer = net.layer.weight.data_ptr()
    for values in (torch.tensor([0.2, 0.0, 0.7]), torch.rand(5, 3)):
        fm.remerge_(net, values)
        base = {n: p for n, p in fm.detach(copy.deepcopy(net)).named_parameters()}
        states = [dict(e.named_parameters()) for e in experts]
        expected = built_weights(base, states, values.expand(5, 3))
        for name, value in expected.items():
            torch.testing.assert_close(dict(net.named_parameters())[name].data, value)
    assert net.layer.weight.data_ptr() == pointer
    with pytest.raises(ValueError, match=r"shape \[2\], expected \[3\] or \[5, 3\]"):
        fm.remerge_(net, torch.zeros(2))


def test_include_and_exclude(net, experts):
    coefficients = fm.attach(net, experts, include="layer.*", exclude=lambda n: n.endswith("bias"))
    assert coefficients.names == ["layer.weight"]
    assert not isinstance(net.embedding.weight, MergedWeight)
    fm.detach(net)
    with pytest.raises(ValueError, match="no"):
        fm.attach(net, experts, include="nothing.*")


def test_state_dict_holds_merged_values(net, experts):
    coefficients = fm.attach(net, experts)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert not any(isinstance(v, MergedWeight) for v in net.state_dict().values())
    fm.materialize(net)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert coefficients.raw.requires_grad


def test_copies_have_their_own_coefficients(net, experts):
    coefficients = fm.attach(net, experts)
    clone = copy.deepcopy(net)
    with torch.no_grad():
        coefficients.raw.fill_(0.9)
    own = clone.layer.weight.coefficients
    assert own is clone.embedding.weight.coefficients and own is not coefficients
    assert torch.equal(own.raw, torch.full((5, 3), 0.3))
    ours, copied = net.layer.weight, clone.layer.weight
    assert [t.data_ptr() for t in copied.deltas.tensors] == [
        t.data_ptr() for t in ours.deltas.tensors
    ]
    fm.detach(net)
    with torch.no_grad():
        net.layer.weight.zero_()  # the clone's base is its own
    assert copied.base.abs().max() > 0
    assert fm.detach(copy.deepcopy(clone)).layer.weight.abs().max() > 0
    fm.attach(net, experts)
    fm.materialize(clone)
    assert isinstance(net.layer.weight, MergedWeight)


def test_what_cannot_work_is_refused(net, experts):
    fm.attach(net, experts)
    with pytest.raises(ValueError, match="merged weights already"):
        fm.attach(net, experts)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"'layer\.weight' in place"):
            net.layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"'layer\.weight' in place"):
            net.layer.weight[0] = 1
        with pytest.raises(RuntimeError, match=r"'layer\.weight' in place"):
            net.layer.weight += 1
    with pytest.raises(RuntimeError, match="in place"):
        net.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="load into the base model before"):
        net.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match="cannot require grad"):
        net.requires_grad_(True)
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no memory of its own"):
        net.layer.weight.data_ptr()
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.save(net, "/dev/null")
    with pytest.raises(RuntimeError, match=r"float64, expected torch\.float32"):
        net.layer(torch.zeros(2, 6, dtype=torch.float64))


def test_autocast(net, experts):
    coefficients = fm.attach(net, experts)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert coefficients.raw.grad is not None and coefficients.raw.grad[1].abs().max() > 0
    torch.testing.assert_close(y.float(), net.layer(x), rtol=2e-2, atol=2e-2)


def test_other_functions_get_a_built_copy(net, experts):
    coefficients = fm.attach(net, experts)
    weight = net.layer.weight
    assert weight.shape == (6, 6) and weight.dtype == torch.float32 and weight.numel() == 36
    assert "MergedWeight('layer.weight'" in repr(weight)
    (weight.t() * weight).sum().backward()
    assert coefficients.raw.grad[1].abs().max() > 0
    uses = {name: (use, size) for name, use, size in fm.coverage(net)}
    assert uses["layer.weight"] == ({"built": 2}, 36 * 4)
    assert uses["norm.bias"] == ({}, 0)


def test_failed_attach_changes_nothing(net, experts):
    originals = dict(net.named_parameters())
    with torch.no_grad():
        experts[1].layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer\.weight"):
        fm.attach(net, experts)
    assert all(p is originals[n] for n, p in net.named_parameters())
    assert torch.equal(net.norm.running_mean, torch.zeros(6))


def _without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: _without(s, "layer.weight"), r"second: tensor 'layer\.weight' is missing"),
        (lambda s: s | {"new.weight": torch.zeros(2)}, r"second: tensor 'new\.weight' is not in"),
        (
            lambda s: s | {"layer.bias": torch.zeros(7)},
            r"second: tensor 'layer\.bias' has shape \[7\], expected \[6\]",
        ),
        (
            lambda s: s | {"layer.bias": torch.full((6,), torch.inf)},
            r"second: tensor 'layer\.bias' has 6 NaN or Inf",
        ),
        (
            lambda s: s | {"layer.bias": torch.zeros(6, device="meta")},
            r"second: tensor 'layer\.bias' is on",
        ),
        (
            lambda s: s | {"layer.bias": torch.zeros(6, dtype=torch.int64)},
            r"second: tensor 'layer\.bias' is torch\.int64",
        ),
        (
            lambda s: s | {"head.weight": torch.zeros(20, 6)},
            r"'embedding\.weight' and 'head\.weight' differ",
        ),
    ],
)
def test_experts_that_do_not_fit(net, experts, spoil, message):
    states = {"first": experts[0].state_dict(), "second": spoil(dict(experts[1].state_dict()))}
    before = dict(net.named_parameters())
    with pytest.raises(ValueError, match=message):
        fm.attach(net, states)
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert torch.equal(net.norm.running_mean, torch.zeros(6))


def test_no_experts_and_unknown_options(net, experts):
    with pytest.raises(ValueError, match="experts is empty"):
        fm.attach(net, [])
    with pytest.raises(ValueError, match="deltas must be"):
        fm.attach(net, experts, deltas="int3")
    with pytest.raises(ValueError, match="trim must be"):
        fm.attach(net, experts, trim=dict(method="magic"))
    with pytest.raises(ValueError, match="density"):
        fm.attach(net, experts, trim=dict(method="ties", density=1.5))
    with pytest.raises(TypeError, match="expected several experts, got one state dict"):
        fm.attach(net, experts[0].state_dict())


def test_mixed_dtypes_and_strided_experts(net, experts):
    """Experts in bf16 for an fp32 base, and experts whose memory is not contiguous."""
    states = [e.state_dict() for e in experts]
    halves = [
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in s.items()} for s in states
    ]
    for state in halves:
        state["layer.weight"] = state["layer.weight"].t().contiguous().t()
    fm.attach(net, halves, init=[0.2, 0.5, 0.1])
    base = {n: p for n, p in fm.detach(copy.deepcopy(net)).named_parameters()}
    expected = built_weights(
        base,
        [{k: v.float() for k, v in state.items()} for state in halves],
        torch.tensor([0.2, 0.5, 0.1]).expand(5, 3),
    )
    y = net(IDS)
    fm.materialize(net)
    assert net.layer.weight.dtype == torch.float32
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name])
    torch.testing.assert_close(net(IDS), y)


def test_trimmed_deltas_keep_what_ties_elects(net, experts):
    base = {n: p.detach().clone() for n, p in net.named_parameters()}
    states = [dict(e.named_parameters()) for e in experts]
    fm.attach(net, experts, trim=dict(method="ties", density=0.3))
    names = net.layer.weight.coefficients.names
    taus = [torch.cat([(s[n] - base[n]).detach().flatten() for n in names]) for s in states]
    total = taus[0].numel()
    rank = total - int(total * 0.3)
    kept = [torch.where(t.abs() >= t.abs().kthvalue(rank).values, t, 0) for t in taus]
    sign = torch.stack(kept).sum(0).sign()
    expected = [torch.where(t * sign > 0, t, 0) for t in kept]
    weights = dict(net.named_parameters())
    for k in range(3):
        ours = torch.cat([weights[n].deltas.tensors[k].flatten() for n in names])
        assert torch.equal(ours, expected[k])
        assert 0 < (ours != 0).sum() < total


def test_patches_are_computed_again_for_the_backward_pass(monkeypatch):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 4, stride=4)
    experts = make_experts(conv, 2)
    images = torch.randn(2, 3, 8, 12)
    twin, base = copy.deepcopy(conv), {n: p.detach().clone() for n, p in conv.named_parameters()}
    raw = torch.full((len(base), len(experts)), 0.3, requires_grad=True)
    states = [dict(expert.named_parameters()) for expert in experts]
    built = torch.func.functional_call(twin, built_weights(base, states, raw), (images,))
    (expected,) = torch.autograd.grad(built.square().sum(), [raw])
    coefficients = fm.attach(conv, experts, init=0.3)
    unfolded = []
    unfold = merged_functions._unfold
    monkeypatch.setattr(
        merged_functions, "_unfold", lambda *a: unfolded.append(a[0].shape) or unfold(*a)
    )
    loss = conv(images).square().sum()
    assert len(unfolded) == 1
    (found,) = torch.autograd.grad(loss, [coefficients.raw])
    assert len(unfolded) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    loss = conv(images).square().sum()
    images.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place before the backward pass"):
        loss.backward()
