"""Row coefficients: one batch of samples with coefficients of their own, in unchanged models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fastmerge as fm
from fastmerge.attachment import attach_deltas
from fastmerge.deltas import Experts
from fastmerge.row_coefficients import RowCoefficients
from fastmerge.sample_values import SampleValues

from .layouts import DECODER, IDS, LAYOUTS, outputs, transformers
from .plain import built_weights, make_experts
from .tolerances import TOLERANCES


def _attach(model, count=3):
    """The model with row coefficients, and what says what a sample's output is."""
    experts = make_experts(model, count)
    plain = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    states = [dict(e.named_parameters()) for e in experts]
    rows = RowCoefficients(names, [f"e{k}" for k in range(count)])
    deltas = {n: Experts([s[n].detach().contiguous() for s in states]) for n in names}
    attach_deltas(model, deltas, rows)

    def alone(row, call):
        weights = built_weights(dict(plain.named_parameters()), states, row.expand(len(names), -1))
        return call(lambda *args, **kwargs: functional_call(plain, weights, args, kwargs))

    return rows, alone


def _found(layout, output):
    """The outputs that belong to one sample each."""
    if layout == "clip_both_towers":
        return [output.image_embeds, output.text_embeds, output.logits_per_text.diagonal()]
    if layout == "open_clip":
        return list(output[:2])
    return outputs(output)


def _batched(inputs, size):
    """Inputs of so many samples; further ones are the given ones, changed."""
    result = {}
    for name, value in inputs.items():
        more = torch.cat([value] * -(-size // len(value)))[:size]
        scale = torch.linspace(1, 2, size, dtype=torch.float64).view(-1, *[1] * (value.dim() - 1))
        result[name] = more * scale.to(value.dtype) if value.is_floating_point() else more
    return result


def _one_at_a_time(layout, rows, alone, inputs):
    parts = [
        alone(
            rows[b],
            lambda forward, b=b: _found(
                layout, forward(**{k: v[b : b + 1] for k, v in inputs.items()})
            ),
        )
        for b in range(len(rows))
    ]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _assert_equals_one_at_a_time(layout, model, inputs, rows, alone):
    size = len(next(iter(inputs.values())))
    values = torch.randn(size, len(rows.experts), dtype=torch.float64).requires_grad_()
    with rows.using(values):
        ours = _found(layout, model(**inputs))
    theirs = _one_at_a_time(layout, values, alone, inputs)
    probes = [torch.randn_like(y) for y in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    gradients = [
        torch.autograd.grad(sum((y * p).sum() for y, p in zip(found, probes, strict=True)), values)
        for found in (ours, theirs)
    ]
    assert gradients[1][0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11 * gradients[1][0].abs().max())


# batches as large as another dimension: tokens, patches and the class token, channels
@pytest.mark.parametrize(
    "layout, size",
    [(layout, 3) for layout in LAYOUTS]
    + [("clip", 10), ("open_clip", 10), ("timm_vit", 10), ("bert", 6), ("t5", 6), ("t5", 4)]
    + [("convnext", 8)],
)
def test_mixed_batches_equal_one_sample_at_a_time(layout, size):
    torch.manual_seed(0)
    model, inputs, _ = LAYOUTS[layout]()
    _assert_equals_one_at_a_time(layout, model, _batched(inputs, size), *_attach(model))


TOKENS = {
    "bert": ("input_ids",),
    "distilbert": ("input_ids",),
    "gpt2": ("input_ids",),
    "qwen2": ("input_ids",),
    "t5": ("input_ids", "decoder_input_ids"),
}


@pytest.mark.parametrize("size", [3, 6])
@pytest.mark.parametrize("layout", TOKENS)
def test_token_ids(layout, size):
    torch.manual_seed(1)
    model, _, _ = LAYOUTS[layout]()
    rows, alone = _attach(model)
    ids = (torch.tensor(IDS) + 2).clamp(max=49)  # none that pads: see the next test
    inputs = _batched(dict.fromkeys(TOKENS[layout], ids), size)
    _assert_equals_one_at_a_time(layout, model, inputs, rows, alone)


def test_the_padding_row_gets_no_gradient():
    model = nn.Embedding(5, 4, padding_idx=1).double()
    rows, _ = _attach(model)
    values = torch.rand(2, 3, dtype=torch.float64).requires_grad_()
    with rows.using(values):
        found = model(torch.tensor([[1, 1], [1, 2]]))
        (gradient,) = torch.autograd.grad(found.sum(), values)
        assert found[0].abs().min() > 0
    assert gradient[0].abs().max() == 0 and gradient[1].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["clip", "bert", "llama"])
def test_no_worse_than_plain_pytorch(layout, dtype):
    torch.manual_seed(2)
    model, inputs, _ = LAYOUTS[layout]()
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    exact, exact_inputs = copy.deepcopy(model).double(), {
        k: v.double() if v.is_floating_point() else v for k, v in inputs.items()
    }  # fmt: skip
    values = torch.rand(3, 3)
    rows, alone = _attach(model)
    with torch.no_grad(), rows.using(values):
        (ours, *_) = _found(layout, model(**inputs))
    with torch.no_grad():
        (eager, *_) = _one_at_a_time(layout, values, alone, inputs)
        experts = [
            {n: p.double() for n, p in e.named_parameters()}
            for e in make_experts(copy.deepcopy(exact).to(dtype), 3)
        ]
        base = dict(exact.named_parameters())
        truth = torch.cat([
            _found(layout, functional_call(
                exact, built_weights(base, experts, values[b].double().expand(len(base), -1)), (),
                {k: v[b : b + 1] for k, v in exact_inputs.items()},
            ))[0]
            for b in range(3)
        ])  # fmt: skip
    error, plain = (torch.linalg.vector_norm(y.double() - truth) for y in (ours, eager))
    assert error <= plain + TOLERANCES[dtype] * torch.linalg.vector_norm(truth)


class _Parts(nn.Module):
    """What the layouts lack: attention with the batch second inside, norms, other convolutions."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv1d(2, 4, 3, padding=1)
        self.group = nn.GroupNorm(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.rms = nn.RMSNorm(4)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.shift = nn.Parameter(torch.randn(5, 4))
        self.bilinear = nn.Parameter(torch.randn(4, 4))
        self.up = nn.ConvTranspose1d(4, 2, 2)
        self.slope = nn.PReLU()
        self.token = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = self.group(self.wide(x)).transpose(1, 2)  # [B, 5, 4]
        x = self.rms(self.attention(x, x, x)[0]) * self.scale.exp() + self.shift
        x = self.slope(x @ self.bilinear)
        token = self.token.view(1, 1, -1).expand(x.shape[0], -1, -1)
        x = torch.cat([token, x], dim=1)
        return self.up(x.transpose(1, 2)) - self.token.sum() / 2


@pytest.mark.parametrize("size", [2, 4, 5])
def test_other_functions(size):
    torch.manual_seed(3)
    model = _Parts().double()
    rows, alone = _attach(model)
    inputs = {"x": torch.randn(size, 2, 5, dtype=torch.float64)}
    _assert_equals_one_at_a_time("parts", model, inputs, rows, alone)


def test_equal_rows_take_the_ordinary_path():
    """[K] and a batch of one are computed with as attached models are, whatever the function."""
    torch.manual_seed(4)
    model = nn.Linear(4, 4).double()
    rows, alone = _attach(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    row = torch.randn(3, dtype=torch.float64)
    with rows.using(row[None]):
        assert torch.equal(
            torch.linalg.inv(model.weight), torch.linalg.inv(model.weight.combined())
        )
        torch.testing.assert_close(model(x), alone(row, lambda forward: forward(x)))


def test_flattened_activations():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)).double()
    rows, alone = _attach(model)
    x, values = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    with rows.using(values):
        ours = model(x.flatten(0, 1)).view(3, 5, 6)
    theirs = torch.stack([alone(values[b], lambda f, b=b: f(x[b])) for b in range(3)])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "shape, function",
    [
        ((7, 4), lambda w, x: F.linear(x, w)),  # 7 rows of 2 samples
        ((5, 2, 4), lambda w, x: F.linear(x, w)),  # the batch second
        ((5, 2, 4), lambda w, x: F.layer_norm(x, [4], w[0])),
        ((2, 4), lambda w, x: x @ w.t()),
        ((2, 4), lambda w, x: torch.linalg.solve(w, x.t())),
        ((2, 4), lambda w, x: F.batch_norm(x, None, None, w[0], training=True)),
        ((3, 4), lambda w, x: w.sum(0) + x),
    ],
)
def test_what_cannot_be_told_apart_is_refused(shape, function):
    model = nn.Linear(4, 4, bias=False)
    rows, _ = _attach(model)
    with rows.using(torch.rand(2, 3)), pytest.raises(RuntimeError, match="'weight'") as error:
        result = function(model.weight, torch.randn(shape))
        assert isinstance(result, SampleValues)
        result.of_batch()
    assert "samples" in str(error.value)


def test_mixtures_of_experts_are_refused():
    """Their layers get the tokens that were routed to them, in an order of their own."""
    config = transformers.MixtralConfig(
        **DECODER, num_local_experts=2, num_experts_per_tok=2, experts_implementation="eager"
    )
    model = transformers.MixtralForCausalLM(config)
    rows, _ = _attach(model, 2)
    with rows.using(torch.rand(3, 2)), pytest.raises(RuntimeError, match=r"experts.*told apart"):
        model(input_ids=torch.tensor(IDS))


def test_tables_too_large_to_write_out_are_refused(monkeypatch):
    monkeypatch.setattr(fm.merged_samples, "MAX_VALUES", 2 * 16 - 1)
    model = nn.Linear(4, 4, bias=False)
    rows, _ = _attach(model)
    with rows.using(torch.rand(2, 3)), pytest.raises(RuntimeError, match=r"'weight'.*2 samples"):
        model.weight * 2


def test_nothing_set():
    model = nn.Linear(4, 4)
    rows, _ = _attach(model)
    with pytest.raises(RuntimeError, match="'bias' is used, but no coefficients are set"):
        model(torch.randn(2, 4))
    with rows.using(torch.rand(2, 3)):
        with pytest.raises(RuntimeError, match="no one value now"):
            model.state_dict()
    with pytest.raises(RuntimeError, match="no coefficients are set"):
        model.state_dict()


@pytest.mark.parametrize(
    "rows", [torch.rand(2, 2), torch.rand(()), torch.rand(1, 2, 3), torch.ones(2, 3).long()]
)
def test_wrong_rows(rows):
    coefficients = RowCoefficients(["w"], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"expected floating point \[B, 3\] or \[3\]"):
        coefficients.set(rows)


@pytest.mark.parametrize("names, experts", [([], ["a"]), (["w"], []), (["w"], ["a", "a"])])
def test_wrong_names(names, experts):
    with pytest.raises(ValueError, match=r"at least one|must be unique"):
        RowCoefficients(names, experts)


@pytest.mark.parametrize("inside", [False, True])
def test_activation_checkpointing(inside):
    """Computing again works where it sets its own rows, and is refused where they may be others."""
    torch.manual_seed(6)
    model = nn.Linear(4, 4).double()
    rows, alone = _attach(model)
    x = torch.randn(2, 4, dtype=torch.float64)
    values = torch.randn(2, 3, dtype=torch.float64).requires_grad_()

    def with_rows(x):
        with rows.using(values):
            return model(x)

    if inside:
        y = checkpoint(with_rows, x, use_reentrant=False)
        (ours,) = torch.autograd.grad(y.square().sum(), values)
        y = torch.stack([alone(values[b], lambda f, b=b: f(x[b])) for b in range(2)])
        (theirs,) = torch.autograd.grad(y.square().sum(), values)
        torch.testing.assert_close(ours, theirs)
        return
    with rows.using(values):
        y = checkpoint(model, x, use_reentrant=False).square().sum()
        with pytest.raises(RuntimeError, match="in a backward pass"):
            y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no coefficients are set"):
        y.backward()


@pytest.mark.parametrize("layout", ["clip", "bert"])
def test_compile_without_graph_breaks(layout):
    torch.manual_seed(7)
    model, inputs, _ = LAYOUTS[layout]()
    for layers in filter(lambda m: isinstance(m, nn.ModuleList), model.modules()):
        del layers[1:]  # the others are traced alike, which takes as long again
    rows, _ = _attach(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(2):
        values = torch.randn(3, 3, dtype=torch.float64).requires_grad_()
        with rows.using(values), torch._dynamo.config.patch(error_on_recompile=step > 0):
            found = [sum(y.square().sum() for y in outputs(f(**inputs))) for f in (model, compiled)]
        gradients = [torch.autograd.grad(loss, values)[0] for loss in found]
        torch.testing.assert_close(*found)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
