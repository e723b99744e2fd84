"""Block and chunk granularity, parametrizations: gradients against autograd, files, merging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastmerge as fm
from fastmerge.blocks import place_of
from fastmerge.coefficients import Coefficients, load_coefficients
from fastmerge.methods import Block
from fastmerge.methods.weighted import Weighted
from fastmerge.parametrizations import PARAMETRIZATIONS
from fastmerge.report import coefficient_grid

from .plain import make_experts


class _Conv1D(nn.Module):
    """GPT-2's layout: y = x W + b with W [I, O]."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        y = torch.addmm(self.bias, x.flatten(0, -2), self.weight)
        return y.view(*x.shape[:-1], 5)


class _Net(nn.Module):
    """Every way of computing with a merged weight, tied weights and two blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 6, padding_idx=0)
        self.patch = nn.Conv2d(2, 6, 2, stride=2)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(6),
                    "attention": nn.MultiheadAttention(6, 2, batch_first=True),
                    "mlp": nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6)),
                }
            )
            for _ in range(2)
        )
        self.out = _Conv1D()
        self.head = nn.Linear(6, 23, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, ids, image):
        x = torch.cat([self.embed(ids), self.patch(image).flatten(2).transpose(1, 2)], 1)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            h = layer["norm"](x)
            x = x + layer["attention"](h, h, h, need_weights=False)[0]
            x = x + layer["mlp"](x)
        return self.scale * self.head(x), self.out(x)


def _inputs():
    return torch.tensor([[3, 0, 22], [7, 7, 1]]), torch.randn(2, 2, 4, 4, dtype=torch.float64)


def _slerp(taus, raw):
    """Spherical interpolation of whole vectors: taus [K, N], raw [K]."""
    direction = taus[0]
    for tau, alpha in zip(taus[1:], raw, strict=False):
        angle = torch.acos(direction @ tau / (direction.norm() * tau.norm()))
        direction = ((1 - alpha) * angle).sin() * direction + (alpha * angle).sin() * tau
        direction = direction / angle.sin()
    return raw[-1] * direction


def _plain_weights(base, experts, coefficients, raw):
    """Built weights with a graph to raw, by definition: group by group, chunk by chunk."""
    pieces, groups = {}, {}
    row = 0
    for name, count in zip(coefficients.names, coefficients.chunks, strict=True):
        height = base[name].shape[0] if base[name].dim() else 1
        for c in range(count):
            rows = slice(height * c // count, height * (c + 1) // count)
            pieces[row] = (name, rows if base[name].dim() else ...)
            groups.setdefault(coefficients.rows[row], []).append(row)
            row += 1
    merged = {}
    for group, members in groups.items():
        taus = {
            r: torch.stack([(e[pieces[r][0]] - base[pieces[r][0]])[pieces[r][1]] for e in experts])
            for r in members
        }
        values = raw[group]
        if coefficients.parametrization == "slerp":
            flat = torch.cat([taus[r].reshape(3, -1) for r in members], 1)
            total = _slerp(flat, values).split([taus[r][0].numel() for r in members])
            change = {r: t.view(taus[r][0].shape) for r, t in zip(members, total, strict=True)}
        else:
            if coefficients.parametrization == "softmax":
                values = values.exp() / values.exp().sum()
            elif coefficients.parametrization == "tanh":
                values = (values.exp() - (-values).exp()) / (values.exp() + (-values).exp())
            change = {r: torch.tensordot(values, taus[r], 1) for r in members}
        for r in members:
            merged[r] = base[pieces[r][0]][pieces[r][1]] + change[r]
    weights, row = {}, 0
    for name, count in zip(coefficients.names, coefficients.chunks, strict=True):
        parts = [merged[row + c] for c in range(count)]
        weights[name] = parts[0] if count == 1 else torch.cat(parts)
        row += count
    return weights


def _attached(**options):
    torch.manual_seed(0)
    model = _Net().double().eval()
    experts = make_experts(model, 3, scale=0.2)
    plain = copy.deepcopy(model)
    # one number alone leaves slerp no angle
    whole = options.get("parametrization") == "slerp" and "include" not in options
    exclude = "scale" if whole else None
    coefficients = fm.attach(model, experts, clamp=None, exclude=exclude, **options).double()
    with torch.no_grad():
        coefficients.raw.add_(0.2 * torch.rand_like(coefficients.raw))
    return model, plain, experts, coefficients


CHUNKED = {"granularity": "chunk", "chunks": 3}
UNEVEN = {
    "granularity": "chunk",
    "chunks": {"embed.weight": 4, "out.weight": 5, "patch.weight": 2, "out.bias": 2,
               "layers.0.attention.in_proj_weight": 4, "layers.1.mlp.0.weight": 7},
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"granularity": "block"}, CHUNKED, UNEVEN]
    + [
        {"granularity": granularity, "parametrization": parametrization}
        for granularity in ("block", "layer", "chunk")
        for parametrization in ("softmax", "tanh", "slerp")
    ],
    ids=lambda o: "-".join(str(v) for v in o.values() if not isinstance(v, dict)),
)
def test_gradients_equal_plain_autograd(options):
    model, plain, experts, coefficients = _attached(**options)
    ids, image = _inputs()
    probes = None

    def gradients(forward, raw):
        nonlocal probes
        x = image.clone().requires_grad_()
        outputs = forward(ids, x)
        probes = [torch.randn_like(y) for y in outputs] if probes is None else probes
        loss = sum((y * p).sum() for y, p in zip(outputs, probes, strict=True))
        return [loss, *torch.autograd.grad(loss, [x, raw])]

    ours = gradients(model, coefficients.raw)
    if coefficients.gram is not None:  # kept in fp32, so compare with the exact one
        coefficients.gram.copy_(_exact_gram(plain, experts, coefficients))
        ours = gradients(model, coefficients.raw)
    raw = coefficients.raw.detach().clone().requires_grad_()
    base = {n: p.detach() for n, p in plain.named_parameters()}
    states = [{n: p.detach() for n, p in e.named_parameters()} for e in experts]
    weights = _plain_weights(base, states, coefficients, raw)
    theirs = gradients(lambda *args: functional_call(plain, weights, args), raw)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * b.abs().max().item())
    uses = {name: use for name, use, _ in fm.coverage(model)}
    assert set(uses["embed.weight"]) == {"rows", "merged_linear"}
    assert set(uses["patch.weight"]) == {"patches"}
    for name in ("out.weight", "layers.0.attention.in_proj_weight", "layers.1.mlp.0.weight"):
        assert set(uses[name]) == {"merged_linear"}, name


def _exact_gram(plain, experts, coefficients):
    base = dict(plain.named_parameters())
    gram = torch.zeros_like(coefficients.gram)
    row = 0
    for name, count in zip(coefficients.names, coefficients.chunks, strict=True):
        taus = torch.stack([dict(e.named_parameters())[name] - base[name] for e in experts])
        height = base[name].shape[0] if base[name].dim() else 1
        for c in range(count):
            part = taus.detach().view(3, height, -1)[:, height * c // count :]
            part = part[:, : height * (c + 1) // count - height * c // count].flatten(1)
            gram[coefficients.rows[row + c]] += part @ part.t()
        row += count
    torch.testing.assert_close(coefficients.gram, gram, rtol=1e-5, atol=1e-6)
    return gram


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_initial_coefficients_survive_the_parametrization(parametrization):
    init = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    taus = torch.randn(2, 3, 9)
    coefficients = Coefficients(
        ["a", "b"],
        ["x", "y", "z"],
        init=init,
        parametrization=parametrization,
        gram=taus @ taus.mT,
    )
    torch.testing.assert_close(coefficients.matrix(), init, rtol=1e-4, atol=1e-5)
    assert (parametrization == "identity") == torch.equal(coefficients.raw.detach(), init)


def test_parallel_and_vanishing_task_vectors():
    """Slerp of equal task vectors interpolates linearly; a zero one is at a right angle."""
    tau = torch.randn(5)
    for taus in (torch.stack([tau, tau]), torch.stack([tau, torch.zeros(5)]), torch.zeros(2, 5)):
        coefficients = Coefficients(
            ["a"], ["x", "y"], parametrization="slerp", gram=(taus @ taus.t()).unsqueeze(0)
        )
        torch.testing.assert_close(
            coefficients.matrix(), torch.full((1, 2), 0.3), rtol=1e-3, atol=0
        )
        (gradient,) = torch.autograd.grad(coefficients.row(0).sum(), [coefficients.raw])
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("granularity", ["block", "chunk"])
def test_materialize_merge_and_file_agree(tmp_path, parametrization, granularity):
    torch.manual_seed(1)
    model = _Net().eval()
    base, experts = copy.deepcopy(model), make_experts(model, 3)
    options = {"granularity": granularity, "parametrization": parametrization}
    coefficients = fm.attach(model, experts, **options)
    with torch.no_grad():
        coefficients.raw.add_(0.1 * torch.randn_like(coefficients.raw))
    path = tmp_path / "coefficients.safetensors"
    coefficients.save(path)
    loaded = load_coefficients(path)
    assert torch.equal(loaded.raw, coefficients.raw)
    assert torch.equal(loaded.matrix(), coefficients.matrix())
    for attribute in ("names", "labels", "groups", "rows", "chunks", "clamp", "granularity"):
        assert getattr(loaded, attribute) == getattr(coefficients, attribute), attribute
    y = model(*(t.float() if t.is_floating_point() else t for t in _inputs()))[0]
    fm.materialize(model)
    x = _inputs()
    merged = fm.merge(base, experts, coefficients=path)
    for name, value in merged.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert y.shape == model(x[0], x[1].float())[0].shape
    fm.remerge_(model, torch.zeros_like(coefficients.matrix()))
    assert torch.equal(model.out.weight, base.out.weight)
    fm.remerge_(model, coefficients)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in merged.state_dict().items())
    fm.detach(model)
    again = fm.attach(model, experts, **options).load(path)
    assert torch.equal(again.matrix(), coefficients.matrix())


def test_row_blocks_give_the_bytes_of_whole_tensors():
    torch.manual_seed(2)
    base, experts = torch.randn(11, 3), [torch.randn(11, 3) for _ in range(2)]
    rows = torch.rand(4, 2)
    method = Weighted({"w": rows}, {"w": 11})
    whole = method.combine(Block("w", base, experts), {})
    blocks = [
        method.combine(Block("w", base[a:b], [e[a:b] for e in experts], offset=3 * a), {})
        for a, b in ((0, 1), (1, 7), (7, 8), (8, 11))
    ]
    assert torch.equal(torch.cat(blocks), whole)
    chunk = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    expected = base + sum(rows[chunk, k].unsqueeze(1) * (experts[k] - base) for k in range(2))
    torch.testing.assert_close(whole, expected)


def test_compile_without_graph_breaks():
    few = ("embed.*", "patch.*", "out.*")  # a row of coefficients is traced for every chunk
    model, _, _, coefficients = _attached(
        granularity="chunk", chunks=2, parametrization="slerp", include=few
    )
    inputs = _inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(sum(y.square().sum() for y in f(*inputs)), [coefficients.raw])[0]
        for f in (model, compiled)
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, block, number",
    [
        ("vision_model.encoder.layers.3.q_proj.weight", "vision_model.encoder.layers.3", 3),
        ("bert.encoder.layer.11.output.dense.bias", "bert.encoder.layer.11", 11),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0", 0),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", "encoder.block.2", 2),
        ("model.layers.5.mlp.experts.2.w1.weight", "model.layers.5", 5),
        ("resnet.encoder.stages.1.layers.0.layer.2.convolution.weight",
         "resnet.encoder.stages.1.layers.0", 0),
        ("stages.2.blocks.7.mlp.fc1.weight", "stages.2.blocks.7", 7),
        ("layer3.1.conv2.weight", "layer3.1", 1),
        ("blocks.4.1.conv_pw.weight", "blocks.4.1", 1),
        ("visual.transformer.resblocks.9.attn.in_proj_weight", "visual.transformer.resblocks.9", 9),
        ("0.weight", "0", 0),
        ("embeddings.word_embeddings.weight", "embeddings.word_embeddings", None),
        ("logit_scale", "logit_scale", None),
    ],
)  # fmt: skip
def test_blocks_are_found_by_name(name, block, number):
    assert place_of(name).block == block and place_of(name).number == number


def test_block_rows_and_their_heat_map():
    _, _, _, coefficients = _attached(granularity="block")
    assert coefficients.groups == ["scale", "embed", "patch", "conv", "layers.0", "layers.1", "out"]
    grid, kinds, blocks = coefficient_grid(coefficients.matrix().numpy(), coefficients.labels)
    assert blocks == [-1, 0, 1] and "attention.in_proj_weight" in kinds
    at = kinds.index("mlp.0.weight")
    row = coefficients.raw.detach()[coefficients.groups.index("layers.0")]
    assert grid[:, at, 1].tolist() == row.tolist()


def test_encoder_and_decoder_blocks_have_cells_of_their_own():
    names = [
        f"{side}.block.{i}.layer.0.q.weight" for side in ("encoder", "decoder") for i in (0, 1)
    ]
    values = torch.arange(4.0).view(4, 1).numpy()
    grid, kinds, blocks = coefficient_grid(values, names)
    assert kinds == ["encoder.block.layer.0.q.weight", "decoder.block.layer.0.q.weight"]
    assert grid[0].tolist() == [[0, 1], [2, 3]] and blocks == [0, 1]


def test_initial_coefficients_from_another_granularity(tmp_path):
    names, shapes = ["layers.0.a", "layers.0.b", "layers.1.a"], [[4, 2], [4], [4, 2]]
    options = {"shapes": shapes, "clamp": None}
    layer = Coefficients(names, ["x", "y"], init=torch.rand(3, 2), **options)
    block = Coefficients(names, ["x", "y"], granularity="block", init=layer, **options)
    torch.testing.assert_close(block.raw[0], layer.raw[:2].mean(0))
    torch.testing.assert_close(block.raw[1], layer.raw[2])
    chunk = Coefficients(names, ["y", "x"], granularity="chunk", chunks=2, init=layer, **options)
    assert chunk.labels == ["layers.0.a#0", "layers.0.a#1", "layers.0.b",
                            "layers.1.a#0", "layers.1.a#1"]  # fmt: skip
    assert torch.equal(chunk.matrix(), layer.matrix()[[0, 0, 1, 2, 2]][:, [1, 0]])
    back = Coefficients(names, ["x", "y"], init=chunk, **options)
    torch.testing.assert_close(back.matrix(), layer.matrix())
    three = {names[0]: 3}
    with pytest.raises(ValueError, match=r"2 chunks for 'layers\.0\.a', expected 3"):
        Coefficients(names, ["x", "y"], granularity="chunk", chunks=three, init=chunk, **options)
    with pytest.raises(ValueError, match="init is for experts"):
        Coefficients(names, ["x", "z"], init=layer, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunks": 2}, "chunks belong to granularity 'chunk'"),
        ({"granularity": "chunk", "chunks": 0}, "must be in 1..4"),
        (
            {"granularity": "chunk", "chunks": {"a": 5}},
            r"chunks of 'a' must be in 1\.\.4 .*, got 5",
        ),
        ({"granularity": "chunk", "shapes": None}, "needs shapes"),
        ({"parametrization": "cosine"}, "parametrization must be one of 'identity'"),
        ({"parametrization": "slerp"}, r"slerp needs gram of shape \[2, 2, 2\], got None"),
        ({"parametrization": "softmax", "init": [0.0, 1.0]}, "init must be"),
        ({"parametrization": "tanh", "init": 1.0}, "init must"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Coefficients(["a", "b"], ["x", "y"], **({"shapes": [[4, 2], [4]]} | options))


@pytest.mark.parametrize(
    "granularity, parametrization",
    [("block", "slerp"), ("chunk", "tanh"), ("block", "softmax"), ("chunk", "identity")],
)
def test_learning_and_resuming(tmp_path, granularity, parametrization):
    torch.manual_seed(5)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    experts = make_experts(base, 3, scale=0.5)
    batches = {"task": [torch.randn(16, 6)]}
    options = {"granularity": granularity, "parametrization": parametrization}

    def learned(steps, **more):
        model = copy.deepcopy(base)
        coefficients = fm.attach(model, experts, **options)
        history = fm.learn(model, coefficients, batches, steps=steps, lr=1e-2, **more)
        return coefficients, history

    straight, history = learned(12)
    assert history.loss[-1] < history.loss[0]
    checkpoint = {"checkpoint": tmp_path / "learning.safetensors"}
    learned(5, **checkpoint)
    resumed, _ = learned(12, resume=True, **checkpoint)
    assert torch.equal(resumed.raw, straight.raw)
    options["parametrization"] = "tanh" if parametrization == "identity" else "identity"
    with pytest.raises(ValueError, match="parametrization is"):
        learned(12, resume=True, **checkpoint)
