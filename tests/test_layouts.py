"""Unchanged models of other libraries: gradients through merged weights against plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmerge as fm

from .plain import built_call, make_experts

transformers = pytest.importorskip("transformers")


def _clip():
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
        projection_dim=8,
    )
    inputs = {"pixel_values": torch.randn(3, 3, 12, 12, dtype=torch.float64)}
    return transformers.CLIPVisionModelWithProjection(config), inputs, "pixel_values"


def _bert():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    inputs = {
        "inputs_embeds": torch.randn(3, 7, 16, dtype=torch.float64),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4]),
    }
    return transformers.BertModel(config), inputs, "inputs_embeds"


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )
    inputs = {"inputs_embeds": torch.randn(2, 6, 16, dtype=torch.float64)}
    return transformers.GPT2LMHeadModel(config), inputs, "inputs_embeds"


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    inputs = {"inputs_embeds": torch.randn(2, 6, 16, dtype=torch.float64)}
    return transformers.LlamaForCausalLM(config), inputs, "inputs_embeds"


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
    inputs = {"inputs_embeds": torch.randn(4, 8, 384, dtype=torch.float64)}
    return transformers.BertModel(config, add_pooling_layer=False), inputs, "inputs_embeds"


LAYOUTS = {"clip": _clip, "bert": _bert, "gpt2": _gpt2, "llama": _llama}


def _first_tensor(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize(
    "layout, granularity",
    [(layout, granularity) for layout in LAYOUTS for granularity in ("task", "layer")]
    + [("minilm", "layer")],
)
def test_gradients_equal_plain_autograd(layout, granularity):
    torch.manual_seed(0)
    model, inputs, differentiable = (LAYOUTS | {"minilm": _minilm})[layout]()
    model = model.double().eval()
    experts = make_experts(model, 3)
    plain = copy.deepcopy(model)
    init = 0.3 + 0.1 * torch.rand(3)
    coefficients = fm.attach(model, experts, granularity=granularity, init=init).double()
    probe = None

    def loss_and_gradients(forward, leaves):
        nonlocal probe
        x = inputs[differentiable].clone().requires_grad_()
        y = _first_tensor(forward(**(inputs | {differentiable: x})))
        probe = torch.randn_like(y) if probe is None else probe
        loss = (y * probe).sum()
        return loss, torch.autograd.grad(loss, [x, *leaves])

    loss, gradients = loss_and_gradients(model, [coefficients.raw])
    raw = coefficients.raw.detach().clone().requires_grad_()
    matrix = raw[coefficients.rows]
    assert list(dict(plain.named_parameters())) == coefficients.names
    built_loss, built = built_call(
        plain, experts, matrix, lambda forward: loss_and_gradients(forward, [raw])
    )
    torch.testing.assert_close(loss, built_loss, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(gradients, built, strict=True):
        assert theirs.abs().max() > 0
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("layout", ["bert", "gpt2", "llama"])
def test_token_ids(layout):
    """Embeddings combined row by row, the padding row without gradient, tied heads."""
    torch.manual_seed(1)
    model, _, _ = LAYOUTS[layout]()
    model = model.double().eval()
    experts = make_experts(model, 2)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts).double()
    ids = torch.tensor([[3, 7, 7, 0, 0], [11, 49, 2, 5, 0]])

    def loss(forward):
        y = _first_tensor(forward(input_ids=ids))
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()

    (ours,) = torch.autograd.grad(loss(model), [coefficients.raw])
    raw = coefficients.raw.detach().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(built_call(plain, experts, raw, loss), [raw])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * theirs.abs().max().item())
    uses = {name: use for name, use, _ in fm.coverage(model)}
    table = next(n for n in uses if any(word in n for word in ("word_embeddings", "wte", "embed")))
    assert uses[table].get("rows") == 1


def test_nothing_large_is_built():
    """Linear layers, Conv1D and patch embeddings never become a built weight."""
    for layout in LAYOUTS:
        model, inputs, _ = LAYOUTS[layout]()
        model = model.double().eval()
        fm.attach(model, make_experts(model, 2)).double()
        model(**inputs)
        for name, uses, _ in fm.coverage(model):
            weight = dict(model.named_parameters())[name]
            if weight.dim() >= 2 and "built" in uses:
                assert "embedding" in name or "wpe" in name, (layout, name, uses)


class _Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch1 = nn.Conv1d(2, 3, 4, stride=4, bias=False)
        self.patch2 = nn.Conv2d(3, 4, (2, 3), stride=(2, 3))
        self.plain = nn.Conv2d(4, 5, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(5, 5, 1, groups=5)
        self.norm = nn.GroupNorm(1, 5)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, x):
        x = self.patch1(x)  # [B, 3, N]
        x = x.view(x.shape[0], 3, 7, -1)
        x = self.norm(self.grouped(self.plain(self.patch2(x))))
        x = x.flatten(2).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


def test_convolutions_and_attention():
    torch.manual_seed(2)
    model = _Convolutions().double().eval()
    experts = make_experts(model, 2)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts).double()
    x = torch.randn(2, 2, 4 * 7 * 11 + 3, dtype=torch.float64)

    def loss(forward):
        return forward(x).square().sum()

    (ours,) = torch.autograd.grad(loss(model), [coefficients.raw])
    raw = coefficients.raw.detach().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(built_call(plain, experts, raw, loss), [raw])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    uses = {name: use for name, use, _ in fm.coverage(model)}
    assert uses["patch1.weight"] == {"patches": 1} and uses["patch2.weight"] == {"patches": 1}
    assert uses["plain.weight"] == {"built": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_without_graph_breaks(layout):
    torch.manual_seed(3)
    model, inputs, _ = LAYOUTS[layout]()
    model = model.double().eval()
    coefficients = fm.attach(model, make_experts(model, 2)).double()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def loss(forward):
        return _first_tensor(forward(**inputs)).square().sum()

    for step in range(3):
        with torch.no_grad():
            coefficients.raw.fill_(0.2 + 0.1 * step)
        (eager,) = torch.autograd.grad(loss(model), [coefficients.raw])
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            (graph,) = torch.autograd.grad(loss(compiled), [coefficients.raw])
        torch.testing.assert_close(graph, eager, rtol=1e-9, atol=1e-12)
