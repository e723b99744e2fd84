"""Checkpoints and recipes that merge jobs are measured with: shaped like Qwen2, bf16, in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "tiny": (112, 304, 2, 14, 2, 1024),
}
SHARD_BYTES = 400_000_000


def _config(size: str) -> dict[str, object]:
    hidden, intermediate, layers, heads, few, vocabulary = SIZES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": few,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate, layers, heads, few, vocabulary = SIZES[size]
    narrow = hidden // heads * few
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", narrow), ("v_proj", narrow)):
            yield f"{prefix}self_attn.{name}.weight", (rows, hidden)
            yield f"{prefix}self_attn.{name}.bias", (rows,)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)


def _tensors(size: str, expert: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's tensors for 0, else those of a fine-tuned model near it."""
    common = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(expert)
    for name, shape in _shapes(size):
        base = torch.empty(shape).normal_(0, 0.02, generator=common)
        if "norm" in name:
            base += 1
        base = base.bfloat16()
        if expert:
            base = (base + torch.empty(shape).normal_(0, 1e-3, generator=own)).bfloat16()
        yield name, base


def _write(folder: Path, size: str, expert: int) -> None:
    folder.mkdir(parents=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in _tensors(size, expert):
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(size)))  # last: tells it is complete


def make_models(folder: Path, size: str, experts: int) -> list[Path]:
    """Base and experts in `folder`, made where they are missing."""
    names = ["base", *(f"expert{k}" for k in range(1, experts + 1))]
    for number, name in enumerate(names):
        if not (folder / name / "config.json").exists():
            _write(folder / name, size, number)
    return [folder / name for name in names]


def recipe(method: str, models: list[Path]) -> str:
    """A recipe that fastmerge and mergekit both run."""
    base, *experts = models
    weight = 1 / len(experts)
    own = {
        "linear": f"weight: {weight}",
        "task_arithmetic": f"weight: {weight}",
        "ties": "weight: 1.0, density: 0.2",
        "dare_ties": "weight: 1.0, density: 0.2",
        "della": "weight: 1.0, density: 0.2, epsilon: 0.1",
        "breadcrumbs": "weight: 1.0, density: 0.2, gamma: 0.01",
    }.get(method)
    lines = ["dtype: bfloat16", f"merge_method: {method}"]
    if method == "slerp":
        base, experts = experts[0], experts[:2]
        lines.append("parameters: {t: 0.4}")
    if method != "linear":
        lines.append(f"base_model: {base}")
    if method == "sce":
        lines.append("parameters: {select_topk: 0.2}")
    lines.append("models:")
    for expert in experts:
        lines.append(f"  - model: {expert}")
        if own:
            lines.append(f"    parameters: {{{own}}}")
    return "\n".join(lines) + "\n"
