"""Unchanged models of other libraries with tiny random configurations, for the layout tests.

Each function returns (model in fp64 and eval mode, inputs by name, the differentiable input).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

Layout = tuple[nn.Module, dict[str, Tensor], str | None]

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
DECODER = TEXT | {"num_key_value_heads": 2, "use_cache": False}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
MASK = [[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3]
IDS = [[3, 7, 7, 21, 49, 1], [11, 2, 5, 8, 0, 0], [30, 6, 4, 0, 0, 0]]


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _embedded() -> dict[str, Tensor]:
    return {"inputs_embeds": _normal(3, 6, 16), "attention_mask": torch.tensor(MASK)}


def _image(name: str = "pixel_values", size: int = 12) -> dict[str, Tensor]:
    return {name: _normal(3, 3, size, size)}


def _layout(model: nn.Module, inputs: dict[str, Tensor]) -> Layout:
    return model.double().eval(), inputs, next(iter(inputs))


def clip() -> Layout:
    config = transformers.CLIPVisionConfig(**IMAGE, projection_dim=8)
    return _layout(transformers.CLIPVisionModelWithProjection(config), _image())


def clip_both_towers() -> Layout:
    vision, text = IMAGE | {"model_type": "clip_vision_model"}, TEXT | {"eos_token_id": 1}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    inputs = _image() | {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}
    return _layout(transformers.CLIPModel(config), inputs)


def vit() -> Layout:
    config = transformers.ViTConfig(**IMAGE, num_labels=5)
    return _layout(transformers.ViTForImageClassification(config), _image())


def bert() -> Layout:
    return _layout(transformers.BertModel(transformers.BertConfig(**TEXT)), _embedded())


def distilbert() -> Layout:
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=16
    )
    return _layout(transformers.DistilBertForMaskedLM(config), _embedded())


def gpt2() -> Layout:
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )
    return _layout(transformers.GPT2LMHeadModel(config), _embedded())


def llama() -> Layout:
    config = transformers.LlamaConfig(**DECODER)
    return _layout(transformers.LlamaForCausalLM(config), _embedded())


def qwen2() -> Layout:
    config = transformers.Qwen2Config(**DECODER, tie_word_embeddings=True)
    return _layout(transformers.Qwen2ForCausalLM(config), _embedded())


def mistral() -> Layout:
    config = transformers.MistralConfig(**DECODER, sliding_window=4)
    return _layout(transformers.MistralForCausalLM(config), _embedded())


def t5() -> Layout:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=True, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    inputs = _embedded() | {"decoder_inputs_embeds": _normal(3, 4, 16)}
    return _layout(transformers.T5ForConditionalGeneration(config), inputs)


def whisper() -> Layout:
    config = transformers.WhisperConfig(
        vocab_size=50, num_mel_bins=4, d_model=16, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=6, max_target_positions=8, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    inputs = {"input_features": _normal(3, 4, 12), "decoder_input_ids": torch.tensor(IDS)}
    return _layout(transformers.WhisperForConditionalGeneration(config), inputs)


def convnext() -> Layout:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, patch_size=2, num_labels=5,
        layer_scale_init_value=0.5,
    )  # fmt: skip
    return _layout(transformers.ConvNextForImageClassification(config), _image(size=16))


def resnet() -> Layout:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="bottleneck",
        num_labels=5,
    )  # fmt: skip
    return _layout(transformers.ResNetForImageClassification(config), _image(size=16))


def timm_vit() -> Layout:
    model = import_vision("timm.models.vision_transformer").VisionTransformer(
        img_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.5,
        num_classes=5, init_values=0.5,
    )  # fmt: skip
    return _layout(model, _image("x"))


def open_clip() -> Layout:
    text = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
    vision = {"layers": 2, "width": 16, "head_width": 8, "image_size": 12, "patch_size": 4}
    library = import_vision("open_clip.model")
    inputs = _image("image") | {"text": torch.tensor(IDS)}
    return _layout(library.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text), inputs)


LAYOUTS: dict[str, Callable[[], Layout]] = {
    f.__name__: f
    for f in (
        clip, clip_both_towers, vit, bert, distilbert, gpt2, llama, qwen2, mistral, t5, whisper,
        convnext, resnet, timm_vit, open_clip,
    )
}  # fmt: skip


def import_vision(name: str) -> ModuleType:
    """Import a module of timm or open_clip without torchvision.

    Their models do not compute with it, only their image loading does, and its releases are tied
    to one build of torch each.
    """
    library = name.partition(".")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(name)
    parts = ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc", ".datasets",
             ".datasets.folder", ".models", ".models.feature_extraction")  # fmt: skip
    stubs = {f"torchvision{part}": mock.MagicMock() for part in parts}
    sys.modules.update(stubs)
    try:
        return importlib.import_module(name)
    finally:
        for stub in stubs:
            del sys.modules[stub]


def outputs(output: object) -> list[Tensor]:
    """The tensors of a model's output that are compared: the first one of a library's own type."""
    if isinstance(output, Tensor):
        return [output]
    return list(output) if type(output) is tuple else [output[0]]
