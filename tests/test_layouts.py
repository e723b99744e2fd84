"""Unchanged models of other libraries: gradients through merged weights against plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastmerge as fm

from .layouts import DECODER, IDS, LAYOUTS, outputs, transformers
from .plain import built_call, built_weights, make_experts


def _minilm():
    """The demo's model at its real size, with a small vocabulary."""
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=32,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    return model, {"inputs_embeds": torch.randn(4, 8, 384, dtype=torch.float64)}, "inputs_embeds"


def _gradients(forward, inputs, differentiable, leaves, probes):
    """Loss and its gradients; `probes` weigh the outputs and are filled at the first call."""
    x = inputs[differentiable].clone()
    x = x.requires_grad_() if x.is_floating_point() else None
    given = inputs if x is None else inputs | {differentiable: x}
    found = outputs(forward(**given))
    if not probes:
        probes.extend(torch.randn_like(y) for y in found)
    loss = sum((y * p).sum() for y, p in zip(found, probes, strict=True))
    return [loss, *torch.autograd.grad(loss, [*leaves, *([] if x is None else [x])])]


def _assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * b.abs().max().item())


@pytest.mark.parametrize(
    "layout, granularity",
    [(layout, granularity) for layout in LAYOUTS for granularity in ("task", "layer")]
    + [("minilm", "layer")],
)
def test_gradients_equal_plain_autograd(layout, granularity):
    torch.manual_seed(0)
    model, inputs, differentiable = (LAYOUTS | {"minilm": _minilm})[layout]()
    experts = make_experts(model, 3)
    plain = copy.deepcopy(model)
    init = 0.3 + 0.1 * torch.rand(3)
    coefficients = fm.attach(model, experts, granularity=granularity, init=init).double()
    probes = []
    ours = _gradients(model, inputs, differentiable, [coefficients.raw], probes)
    raw = coefficients.raw.detach().clone().requires_grad_()
    assert list(dict(plain.named_parameters())) == coefficients.names
    theirs = built_call(
        plain,
        experts,
        raw[coefficients.rows],
        lambda forward: _gradients(forward, inputs, differentiable, [raw], probes),
    )
    _assert_close(ours, theirs)


TOKENS = {
    "bert": ("input_ids",),
    "distilbert": ("input_ids",),
    "gpt2": ("input_ids",),
    "llama": ("input_ids",),
    "qwen2": ("input_ids",),
    "t5": ("input_ids", "decoder_input_ids"),
}
TABLES = ("word_embeddings.weight", "wte.weight", "embed_tokens.weight", "shared.weight")
TIED = ("distilbert", "gpt2", "qwen2", "t5")


@pytest.mark.parametrize("layout", TOKENS)
def test_token_ids(layout):
    """Embeddings combined row by row, the padding row without gradient; tied heads add theirs."""
    torch.manual_seed(1)
    model, _, _ = LAYOUTS[layout]()
    experts = make_experts(model, 2)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts).double()
    inputs = dict.fromkeys(TOKENS[layout], torch.tensor(IDS))
    probes = []
    ours = _gradients(model, inputs, "input_ids", [coefficients.raw], probes)
    raw = coefficients.raw.detach().clone().requires_grad_()
    theirs = built_call(
        plain, experts, raw, lambda f: _gradients(f, inputs, "input_ids", [raw], probes)
    )
    _assert_close(ours, theirs)
    uses = {name: use for name, use, _ in fm.coverage(model)}
    (table,) = (name for name in uses if name.endswith(TABLES))
    expected = {"rows": len(inputs), **({"merged_linear": 1} if layout in TIED else {})}
    assert uses[table] == expected


def test_gradients_of_tied_weights_add_up():
    """The shared table's gradient is that of its rows plus that of the head."""
    torch.manual_seed(2)
    model, _, _ = LAYOUTS["gpt2"]()
    experts = make_experts(model, 2)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts).double()
    index = coefficients.names.index("transformer.wte.weight")
    ids = torch.tensor(IDS)
    model(input_ids=ids)[0].square().sum().backward()
    parts = []
    for tied in ("transformer.wte.weight", "lm_head.weight"):
        raw = coefficients.raw.detach().clone().requires_grad_()
        weights = built_weights(
            dict(plain.named_parameters()), [dict(e.named_parameters()) for e in experts], raw
        )
        table = weights.pop("transformer.wte.weight")
        both = dict.fromkeys(("transformer.wte.weight", "lm_head.weight"), table.detach())
        y = functional_call(plain, weights | both | {tied: table}, tie_weights=False,
                            kwargs={"input_ids": ids})[0]  # fmt: skip
        y.square().sum().backward()
        parts.append(raw.grad[index])
    assert all(part.abs().max() > 0 for part in parts)
    torch.testing.assert_close(coefficients.raw.grad[index], parts[0] + parts[1])


BUILT = {
    "k > stride convolutions": ("encoder.conv1", "encoder.conv2", "dwconv", "embedder.embedder",
                                "layer.1.convolution"),
    "tables used whole": ("position_embedding", "embed_positions", "pos_embed", "token_type",
                          "positional_embedding", "relative_attention_bias", "cls_token"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_large_is_built(layout):
    """Linear layers, Conv1D, projections, patch and 1 x 1 convolutions are never built."""
    model, inputs, _ = LAYOUTS[layout]()
    fm.attach(model, make_experts(model, 2)).double()
    model(**inputs)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name, uses, _ in fm.coverage(model):
        if len(shapes[name]) >= 2 and "built" in uses:
            assert any(part in name for parts in BUILT.values() for part in parts), (name, uses)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trimmed_task_vectors(layout):
    """AdaMerging++: what TIES keeps of the whole model, and its gradients."""
    torch.manual_seed(3)
    model, inputs, differentiable = LAYOUTS[layout]()
    experts = make_experts(model, 3)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts, trim=dict(method="ties", density=0.25)).double()
    names = coefficients.names
    base = dict(plain.named_parameters())
    taus = torch.stack(
        [torch.cat([(dict(e.named_parameters())[n] - base[n]).flatten() for n in names])
         for e in experts]
    ).detach()  # fmt: skip
    rank = taus.shape[1] - int(taus.shape[1] * 0.25)
    kept = torch.where(taus.abs() >= taus.abs().kthvalue(rank, 1, keepdim=True).values, taus, 0)
    kept = torch.where(kept * kept.sum(0).sign() > 0, kept, 0)
    sizes = [base[n].numel() for n in names]
    trimmed = [
        {n: base[n] + t.view_as(base[n]) for n, t in zip(names, row.split(sizes), strict=True)}
        for row in kept
    ]
    probes = []
    ours = _gradients(model, inputs, differentiable, [coefficients.raw], probes)
    raw = coefficients.raw.detach().clone().requires_grad_()
    weights = built_weights(base, trimmed, raw)
    theirs = _gradients(
        lambda **given: functional_call(plain, weights, (), given),
        inputs, differentiable, [raw], probes,
    )  # fmt: skip
    _assert_close(ours, theirs)


class _Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch1 = nn.Conv1d(2, 3, 4, stride=4, bias=False)
        self.patch2 = nn.Conv2d(3, 4, (2, 3), stride=(2, 3))
        self.plain = nn.Conv2d(4, 5, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(5, 5, 1, groups=5)
        self.strided = nn.Conv2d(5, 5, 1, stride=(2, 1))
        self.small = nn.Conv1d(5, 5, 1, stride=3)
        self.norm = nn.GroupNorm(1, 5)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, x):
        x = self.patch1(x)  # [B, 3, N]
        x = x.view(x.shape[0], 3, 7, -1)
        x = self.norm(self.strided(self.grouped(self.plain(self.patch2(x)))))
        x = self.small(x.flatten(2)).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


def test_convolutions_and_attention():
    torch.manual_seed(2)
    model = _Convolutions().double().eval()
    experts = make_experts(model, 2)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts).double()
    x = torch.randn(2, 2, 4 * 7 * 31 + 3, dtype=torch.float64)

    def loss(forward):
        return forward(x).square().sum()

    (ours,) = torch.autograd.grad(loss(model), [coefficients.raw])
    raw = coefficients.raw.detach().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(built_call(plain, experts, raw, loss), [raw])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    uses = {name: use for name, use, _ in fm.coverage(model)}
    assert uses["patch1.weight"] == {"patches": 1} and uses["patch2.weight"] == {"patches": 1}
    assert uses["strided.weight"] == {"patches": 1} and uses["small.weight"] == {"patches": 1}
    assert uses["plain.weight"] == {"built": 1} and uses["grouped.weight"] == {"built": 1}


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers(cell):
    """They keep lists of their weights besides the parameters."""
    torch.manual_seed(6)
    model = cell(4, 5, num_layers=2, bidirectional=True, batch_first=True).double()
    experts = make_experts(model, 2)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts).double()
    inputs, probes = {"input": torch.randn(2, 3, 4, dtype=torch.float64)}, []

    def output(forward):
        return lambda **given: forward(**given)[0]

    ours = _gradients(output(model), inputs, "input", [coefficients.raw], probes)
    raw = coefficients.raw.detach().clone().requires_grad_()
    theirs = built_call(
        plain, experts, raw, lambda f: _gradients(output(f), inputs, "input", [raw], probes)
    )
    _assert_close(ours, theirs)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_mixture_of_experts(implementation):
    """Stacked weights [E, O, I]: each expert layer's own slice is computed with, not built."""
    torch.manual_seed(7)
    config = transformers.MixtralConfig(
        **DECODER, num_local_experts=4, num_experts_per_tok=2, experts_implementation=implementation
    )
    model = transformers.MixtralForCausalLM(config).double().eval()
    experts = make_experts(model, 2)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts).double()
    inputs, probes = {"input_ids": torch.tensor(IDS)}, []
    ours = _gradients(model, inputs, "input_ids", [coefficients.raw], probes)
    raw = coefficients.raw.detach().clone().requires_grad_()
    theirs = built_call(
        plain, experts, raw, lambda f: _gradients(f, inputs, "input_ids", [raw], probes)
    )
    _assert_close(ours, theirs)
    ways = {way for n, use, _ in fm.coverage(model) if "mlp.experts" in n for way in use}
    assert ways == {"merged_linear" if implementation == "eager" else "built"}


def test_products_with_a_weight_at_the_right():
    """x @ W as CLIP's projections are written, in every spelling; W @ x gets a built copy."""
    torch.manual_seed(4)
    model = nn.Linear(6, 5, bias=False).double()
    coefficients = fm.attach(model, make_experts(model, 2)).double()
    weight, whole = model.weight, model.weight.combined()
    for shape in ((5,), (3, 5), (2, 3, 5)):
        x = torch.randn(*shape, dtype=torch.float64)
        expected = x @ whole
        (theirs,) = torch.autograd.grad(
            expected.square().sum(), [coefficients.raw], retain_graph=True
        )
        spellings = [x @ weight, x.matmul(weight), torch.matmul(x, weight)]
        spellings += [torch.mm(x, weight), x.mm(weight)] if len(shape) == 2 else []
        for y in spellings:
            torch.testing.assert_close(y, expected)
            (ours,) = torch.autograd.grad(y.square().sum(), [coefficients.raw])
            torch.testing.assert_close(ours, theirs)
    ((_, uses, _),) = fm.coverage(model)
    assert uses == {"merged_linear": 11, "built": 1}
    y = torch.randn(6, 2, dtype=torch.float64)
    torch.testing.assert_close(weight @ y, whole @ y)


COMPILED = ("clip", "gpt2", "llama")  # the others take a minute


@pytest.mark.parametrize(
    "layout",
    [
        *COMPILED,
        *(pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS if n not in COMPILED),
    ],
)
def test_compile_without_graph_breaks(layout):
    torch.manual_seed(3)
    model, inputs, _ = LAYOUTS[layout]()
    if layout == "gpt2":  # its table is also its head
        inputs = {"input_ids": torch.tensor(IDS)}
    coefficients = fm.attach(model, make_experts(model, 2)).double()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def loss(forward):
        return sum(y.square().sum() for y in outputs(forward(**inputs)))

    for step in range(3):
        with torch.no_grad():
            coefficients.raw.fill_(0.2 + 0.1 * step)
        (eager,) = torch.autograd.grad(loss(model), [coefficients.raw])
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            (graph,) = torch.autograd.grad(loss(compiled), [coefficients.raw])
        torch.testing.assert_close(graph, eager, rtol=1e-9, atol=1e-12)
