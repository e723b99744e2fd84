"""Generates checkpoints of real shapes for merge jobs, in little memory and at the disk's speed.

    python -m benches.job_models FOLDER --shape llama-7b --experts 4 --layers 12

makes FOLDER/base and FOLDER/expert0, ... in bf16. Contents repeat: every model is one seeded
pattern of 16 Mi normal numbers over and over, the base's with deviation 0.02, an expert's that plus
0.001, so that task vectors are dense and rows of a tensor differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmerge.checkpoint.layout import make_layout
from fastmerge.checkpoint.writer import Writer, write_texts

PATTERN = (1 << 24) + 43  # no multiple of any row's length
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2-small": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 2, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 16384, "tie_word_embeddings": True,
    },
}  # fmt: skip


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a decoder's tensors, as transformers stores them."""
    width, inner, rows = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (rows, width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (width,)
        for name, height in (("q_proj", width), ("k_proj", narrow), ("v_proj", narrow)):
            yield f"{prefix}self_attn.{name}.weight", (height, width)
            if config["model_type"] == "qwen2":
                yield f"{prefix}self_attn.{name}.bias", (height,)
        yield prefix + "self_attn.o_proj.weight", (width, width)
        yield prefix + "post_attention_layernorm.weight", (width,)
        yield prefix + "mlp.gate_proj.weight", (inner, width)
        yield prefix + "mlp.up_proj.weight", (inner, width)
        yield prefix + "mlp.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (rows, width)


def pattern_of(model: int) -> Tensor:
    """[PATTERN] bf16: the base's numbers for 0, those of expert k for k + 1."""
    noise = torch.empty(PATTERN).normal_(generator=torch.Generator().manual_seed(0)).mul_(0.02)
    if model:
        generator = torch.Generator().manual_seed(model)
        noise += torch.empty(PATTERN).normal_(generator=generator).mul_(0.001)
    return noise.bfloat16()


def write_model(folder: Path, config: dict[str, Any], model: int, shard_bytes: int) -> int:
    """Write one model; returns its bytes."""
    pattern = pattern_of(model)
    pattern = torch.cat([pattern, pattern])  # any stretch of one pattern's length is contiguous
    shapes = dict(tensor_shapes(config))
    tensors = ((name, torch.bfloat16, shape) for name, shape in shapes.items())
    layout = make_layout(tensors, {"format": "pt"}, shard_bytes)
    folder.mkdir(parents=True)
    writer, place = Writer(folder, layout, create=True), 0
    for name, (height, *rest) in shapes.items():
        row = rest[0] if rest else 1
        step = max(1, PATTERN // row)
        for start in range(0, height, step):
            rows = min(step, height - start)
            values = pattern[place : place + rows * row]
            writer.write(name, start, values.view(rows, *rest))
            place = (place + rows * row) % PATTERN
    writer.close()
    about = {**config, "torch_dtype": "bfloat16"}
    write_texts(folder, layout, {"config.json": json.dumps(about).encode()})
    return layout.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2-0.5b")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, help="fewer layers, where the disk is short")
    parser.add_argument("--shard-bytes", type=int, default=2_000_000_000)
    chosen = parser.parse_args()
    config = dict(SHAPES[chosen.shape])
    if chosen.layers is not None:
        config["num_hidden_layers"] = chosen.layers
    for model in range(chosen.experts + 1):
        name = f"expert{model - 1}" if model else "base"
        size = write_model(chosen.folder / name, config, model, chosen.shard_bytes)
        print(f"{name}: {size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
