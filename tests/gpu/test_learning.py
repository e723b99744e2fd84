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


VISION = {
    "ViT-B/32": {},  # the configuration's defaults
    "ViT-L/14": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}


class Classifier(nn.Module):
    """An image encoder and a linear head on its pooled output."""

    def __init__(self, **shapes: int):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.encoder = CLIPVisionModel(CLIPVisionConfig(**shapes))
        self.head = nn.Linear(self.encoder.config.hidden_size, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(pixel_values=images).pooler_output)


def learn_vision(shapes: dict[str, int], device: str, cuda_graph: bool) -> torch.Tensor:
    """Coefficients after four steps on random images."""
    torch.manual_seed(0)
    model = Classifier(**shapes).eval()
    experts = [e.to(device) for e in make_experts(model, len(TASKS), scale=0.02)]
    model = model.to(device)
    coefficients = fm.attach(model, experts)
    size = model.encoder.config.image_size
    batches = {t: [torch.randn(2, 3, size, size, device=device)] * 4 for t in TASKS}
    fm.learn(model, coefficients, batches, steps=4, lr=1e-2, cuda_graph=cuda_graph)
    return coefficients.raw.detach().clone()


@pytest.mark.parametrize("name", VISION)
def test_cuda_graph_of_vision_models(name):
    pytest.importorskip("transformers", reason="transformers is not installed")
    eager, graph = (learn_vision(VISION[name], "cuda", captured) for captured in (False, True))
    assert (eager - 0.3).abs().max() > 1e-3
    torch.testing.assert_close(graph, eager, rtol=0, atol=1e-4)


def test_compiled_model(setting):
    model, experts, data = setting
    coefficients = fm.attach(model, experts)
    x = data["a"]
    (eager,) = torch.autograd.grad(model(x).square().sum(), [coefficients.raw])
    compiled = torch.compile(model, fullgraph=True)
    (graph,) = torch.autograd.grad(compiled(x).square().sum(), [coefficients.raw])
    torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-3 * eager.abs().max().item())
