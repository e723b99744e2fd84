"""Which linear layers are found to be a transformer's MLPs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmerge.modules.mlp_blocks import find_mlp_blocks, linear_shape

from .layouts import LAYOUTS

# Module before the router, linear layers of the first MLP found, how many MLPs there are.
FOUND = {
    "clip": ("vision_model.encoder.layers.0.mlp", ".fc1 .fc2", 2),
    "clip_both_towers": ("text_model.encoder.layers.0.mlp", ".fc1 .fc2", 4),
    "vit": ("vit.layers.0.mlp", ".fc1 .fc2", 2),
    "bert": ("encoder.layer.0.intermediate.dense", " ../../output.dense", 2),
    "distilbert": ("distilbert.transformer.layer.0.ffn", ".lin1 .lin2", 2),
    "gpt2": ("transformer.h.0.mlp", ".c_fc .c_proj", 2),
    "llama": ("model.layers.0.mlp", ".gate_proj .up_proj .down_proj", 2),
    "qwen2": ("model.layers.0.mlp", ".gate_proj .up_proj .down_proj", 2),
    "mistral": ("model.layers.0.mlp", ".gate_proj .up_proj .down_proj", 2),
    "t5": ("encoder.block.0.layer.1.DenseReluDense", ".wi_0 .wi_1 .wo", 4),
    "whisper": ("model.encoder.layers.0.fc1", " ../fc2", 4),
    "convnext": ("convnext.encoder.stages.0.layers.0.pwconv1", " ../pwconv2", 3),
    "timm_vit": ("blocks.0.mlp", ".fc1 .fc2", 2),
    "open_clip": ("visual.transformer.resblocks.0.mlp", ".c_fc .c_proj", 4),
}


def _layers(before: str, spelled: str) -> list[str]:
    """Names from `.child`, `../sibling` and the empty word for the module itself."""
    names = []
    for word in spelled.split(" "):
        name = before
        while word.startswith("../"):
            name, word = name.rpartition(".")[0], word[3:]
        names.append(name + word if word.startswith(".") or not word else f"{name}.{word}")
    return names


@pytest.mark.parametrize("layout", FOUND)
def test_layouts(layout):
    model, _, _ = LAYOUTS[layout]()
    before, spelled, count = FOUND[layout]
    blocks = find_mlp_blocks(model)
    assert len(blocks) == count
    assert blocks[0].before == before
    layers = dict.fromkeys(name.rpartition(".")[0] for name in blocks[0].parameters)
    assert list(layers) == _layers(before, spelled)
    shapes = [linear_shape(model.get_submodule(layer)) for layer in layers]
    assert blocks[0].width == shapes[0][1] == shapes[-1][0]
    assert len({b.before for b in blocks}) == count


def test_router_sees_what_the_first_layer_gets():
    """A norm inside the MLP's module comes before the router; its parameters are not the MLP's."""
    ffn = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    (block,) = find_mlp_blocks(nn.Sequential(ffn))
    assert block.before == "0.1"
    assert block.parameters == ("0.1.weight", "0.1.bias", "0.3.weight", "0.3.bias")


class _Attention(nn.Module):
    """Query and output projections that have the shapes of an MLP."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(4, 8), nn.Linear(8, 4)


def test_attention_with_the_shapes_of_an_mlp():
    assert not _finds(nn.ModuleList([nn.ModuleDict({"core": _Attention()})]))
    assert not _finds(
        nn.ModuleList([nn.ModuleDict({"attn": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))})])
    )


def test_routed_experts_are_left_out():
    mlp = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    assert not _finds(nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([mlp, mlp])})]))


def test_fused_gate():
    mlp = nn.ModuleDict({"gate_up_proj": nn.Linear(4, 16), "down_proj": nn.Linear(8, 4)})
    (block,) = find_mlp_blocks(nn.ModuleList([mlp]))
    assert block.before == "0"
    assert block.width == 4


def _finds(model: nn.Module) -> bool:
    try:
        return bool(find_mlp_blocks(model))
    except ValueError:
        return False


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),  # not in a numbered block
        nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))),
        nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))),
    ],
)
def test_no_mlp(model):
    with pytest.raises(ValueError, match=r"no MLP was found in Sequential.*blocks="):
        find_mlp_blocks(model)


def test_model_without_mlps():
    assert not _finds(LAYOUTS["resnet"]()[0])


def test_named_blocks():
    model, _, _ = LAYOUTS["bert"]()
    pairs = {
        f"encoder.layer.{i}.intermediate": [
            f"encoder.layer.{i}.intermediate",
            f"encoder.layer.{i}.output.dense",
        ]
        for i in range(2)
    }
    named, found = find_mlp_blocks(model, pairs), find_mlp_blocks(model)
    assert [b.parameters for b in named] == [b.parameters for b in found]
    assert [b.width for b in named] == [16, 16]
    assert named[0].before == "encoder.layer.0.intermediate"
    model, _, _ = LAYOUTS["clip"]()
    assert find_mlp_blocks(model, ["*.mlp"]) == find_mlp_blocks(model)
    assert len(find_mlp_blocks(model, "*.layers.1.mlp")) == 1


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["*.ffn"], "no module of CLIPVisionModelWithProjection matches '\\*.ffn'"),
        ({"nowhere": ["nowhere"]}, "has no module 'nowhere'"),
        (["*.layer_norm1"], "no linear layer in"),
        (["*.layers.0", "*.layers.0.mlp"], "share the parameter"),
    ],
)
def test_wrong_names(blocks, message):
    model, _, _ = LAYOUTS["clip"]()
    with pytest.raises(ValueError, match=message):
        find_mlp_blocks(model, blocks)


def test_linear_shape():
    assert linear_shape(nn.Linear(3, 5)) == (5, 3)
    assert linear_shape(nn.Embedding(3, 5)) is None
    assert linear_shape(nn.LayerNorm(3)) is None
    quantized = nn.Linear(2, 2)
    quantized.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert linear_shape(quantized) is None
