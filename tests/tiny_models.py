"""Small model folders: Llama-like tensors, configuration, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 8


def tensors_of(seed: int, layers: int = 3, rows: int = 12, tied: bool = False) -> dict[str, Tensor]:
    """Tensors of a small decoder, random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"model.embed_tokens.weight": draw(rows, WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "self_attn.q_proj.weight"] = draw(WIDTH, WIDTH)
        tensors[prefix + "mlp.down_proj.weight"] = draw(WIDTH, 2 * WIDTH)
        tensors[prefix + "input_layernorm.weight"] = draw(WIDTH)
    tensors["model.norm.weight"] = draw(WIDTH)
    if not tied:
        tensors["lm_head.weight"] = draw(rows, WIDTH)
    return tensors


def words(count: int) -> list[str]:
    """So many different tokens."""
    return ["<unk>", *(f"w{n}" for n in range(count - 1))]


def write_tokenizer(
    folder: Path, tokens: Sequence[str], added: Mapping[str, int] | None = None, **extra: str
) -> None:
    """A word-level `tokenizer.json`, ids in the order of the tokens."""
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, number in (added or {}).items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "unk_token": "<unk>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    tokens: Sequence[str] | None = None,
    added: Mapping[str, int] | None = None,
    **config: object,
) -> Path:
    """A model folder with weights, config.json and, if tokens are given, a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    layers = {name.split(".")[2] for name in tensors if ".layers." in name}
    about = {
        "model_type": "llama",
        "num_hidden_layers": len(layers),
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "hidden_size": WIDTH,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "float32",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(about))
    if tokens is not None:
        write_tokenizer(folder, tokens, added)
    return folder
