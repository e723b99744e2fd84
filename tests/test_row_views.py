"""Row slices of merged weights, and nn.MultiheadAttention, which takes its packed weight apart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmerge as fm
from fastmerge.merged_weight import MergedWeight

from .plain import built_call, make_experts


def _compare(model, call):
    """Value and gradients of `call(forward)` through merged weights and through built ones."""
    model = model.double().eval()
    experts = make_experts(model, 3)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts, init=torch.rand(1, 3)[0]).double()
    inner = call(model)
    (ours,) = torch.autograd.grad(inner, [coefficients.raw])
    raw = coefficients.raw.detach().clone().requires_grad_()
    built = built_call(plain, experts, raw, call)
    (theirs,) = torch.autograd.grad(built, [raw])
    torch.testing.assert_close(inner, built, rtol=1e-11, atol=1e-11)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    return model


@pytest.mark.parametrize("kind", ["self", "encoder-decoder", "three inputs"])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(kind, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(3))
    inputs = {"self": (q, q, q), "encoder-decoder": (q, k, k), "three inputs": (q, k, v)}[kind]
    options = {"need_weights": False}
    if masked:
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        options = {"attn_mask": torch.ones(5, 5).triu(1).bool(), "key_padding_mask": padding}

    def call(forward):
        return forward(*inputs, **options)[0].square().sum()

    model = _compare(nn.MultiheadAttention(8, 2, batch_first=True), call)
    uses = {name: use for name, use, _ in fm.coverage(model)}
    linears = {"self": 1, "encoder-decoder": 2, "three inputs": 3}[kind]
    assert uses["in_proj_weight"] == {"merged_linear": linears}
    assert uses["out_proj.weight"] == {"merged_linear": 1}


def test_separate_projections_and_extra_keys():
    torch.manual_seed(1)
    q, k = torch.randn(4, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, add_bias_kv=True, add_zero_attn=True)
    model = _compare(model, lambda forward: forward(q, k, k)[0].square().sum())
    uses = {name: use for name, use, _ in fm.coverage(model)}
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"):
        assert uses[name] == {"merged_linear": 1}


def test_transformer_layers():
    torch.manual_seed(2)
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    source, target = (torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 3))
    model = _compare(model, lambda forward: forward(source, target).square().sum())
    for name, use, _ in fm.coverage(model):
        if name.endswith("weight") and "norm" not in name:
            assert set(use) == {"merged_linear"}, (name, use)


def test_attention_without_graph_breaks():
    torch.manual_seed(3)
    model = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    coefficients = fm.attach(model, make_experts(model, 2)).double()
    q, k = (torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 3))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for keys in (q, k):
        grads = [
            torch.autograd.grad(forward(q, keys, keys)[0].square().sum(), [coefficients.raw])[0]
            for forward in (model, compiled)
        ]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def _views(weight):
    return {
        "slice": (weight[2:5], slice(2, 5)),
        "open slice": (weight[-4:], slice(-4, None)),
        "empty": (weight[5:2], slice(5, 2)),
        "narrow": (weight.narrow(0, -3, 2), slice(4, 6)),
        "torch.narrow": (torch.narrow(weight, 0, 1, 3), slice(1, 4)),
        "chunk": (weight.chunk(3)[2], slice(6, 7)),
        "torch.chunk": (torch.chunk(weight, 2, dim=-2)[1], slice(4, 7)),
        "split": (weight.split([3, 4])[1], slice(3, 7)),
        "torch.split": (torch.split(weight, 5)[1], slice(5, 7)),
        "view of a view": (weight[1:6][2:4], slice(3, 5)),
    }


@pytest.mark.parametrize("granularity", ["layer", "chunk"])
def test_slices_of_rows_are_merged_weights(granularity):
    torch.manual_seed(4)
    model = nn.Linear(6, 7).double()
    coefficients = fm.attach(model, make_experts(model, 2), granularity=granularity).double()
    with torch.no_grad():
        coefficients.raw.uniform_(0.1, 0.9)
    whole = model.weight.combined()
    x = torch.randn(3, 6, dtype=torch.float64)
    for what, (view, rows) in _views(model.weight).items():
        assert type(view) is MergedWeight and view.shape == whole[rows].shape, what
        assert view.base.data_ptr() == model.weight.base[rows].data_ptr(), what
        bias = torch.randn(len(view), dtype=torch.float64)
        y = nn.functional.linear(x, view, bias) - bias
        torch.testing.assert_close(y, x @ whole[rows].t())
        ours, theirs = (
            torch.autograd.grad(v.square().sum(), [coefficients.raw], retain_graph=True)[0]
            for v in (y, x @ whole[rows].t())
        )
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(view + 0.0, whole[rows])
    ((_, uses, _), _) = fm.coverage(model)
    assert uses["merged_linear"] == len(_views(model.weight))


@pytest.mark.parametrize("granularity", ["layer", "chunk"])
def test_parts_of_stacked_weights_are_merged_weights(granularity):
    torch.manual_seed(5)
    model = nn.ParameterList([torch.randn(6, 3, 4, dtype=torch.float64)])
    coefficients = fm.attach(model, make_experts(model, 2), granularity=granularity).double()
    with torch.no_grad():
        coefficients.raw.uniform_(0.1, 0.9)
    weight, whole = model[0], model[0].combined()
    x = torch.randn(2, 4, dtype=torch.float64)
    for index in (0, 5, -2, torch.tensor(3), 4):
        part = weight[index]
        assert type(part) is MergedWeight and part.shape == (3, 4)
        ours, theirs = (nn.functional.linear(x, w) for w in (part, whole[index]))
        torch.testing.assert_close(ours, theirs)
        gradients = [
            torch.autograd.grad(y.square().sum(), [coefficients.raw], retain_graph=True)[0]
            for y in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients)
        assert torch.equal(part[1:2] + 0.0, whole[index][1:2])
    for index in (True, torch.tensor(True), torch.tensor([1, 2]), (1, 2)):
        assert torch.equal(weight[index], whole[index])
    with pytest.raises(IndexError, match="index 6 of merged weight '0' with 6 rows"):
        weight[6]


def test_other_slices_are_built():
    model = nn.Linear(6, 7).double()
    fm.attach(model, make_experts(model, 2))
    weight, whole = model.weight, model.weight.combined()
    for index in (3, slice(None, None, 2), (slice(None), 2), torch.tensor([1, 1]), None, ...):
        assert type(weight[index]) is torch.Tensor and torch.equal(weight[index], whole[index])
    assert torch.equal(weight.chunk(2, 1)[1], whole.chunk(2, 1)[1])
    assert torch.equal(weight.narrow(1, 2, 3), whole.narrow(1, 2, 3))
    with pytest.raises(IndexError, match="rows 5 to 9 of merged weight 'weight' with 7 rows"):
        weight.narrow(0, 5, 4)
    with pytest.raises(RuntimeError, match="add up to 6, expected its 7 rows"):
        weight.split([3, 3])
    with pytest.raises(RuntimeError, match="in place"):
        weight[2:4].mul_(2)
