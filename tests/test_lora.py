"""LoRA adapters as experts: the weights PEFT merges, for any block of rows, nothing else taken."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastmerge.checkpoint import Checkpoint, CheckpointError, LoraCheckpoint

from .checkpoints import dense, write_folder
from .tolerances import TOLERANCES


class Net(nn.Module):
    """A layer of every kind that PEFT adapts by two factors."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv1d = Conv1D(8, 6)
        self.q_proj = nn.Linear(8, 10)
        self.k_proj = nn.Linear(10, 4, bias=False)
        self.patches = nn.Conv2d(4, 6, 3)
        self.flat = nn.LayerNorm(10)


def adapted(folder, **config):
    """A base on disk, an adapter on disk, and the state dict PEFT merges them into."""
    torch.manual_seed(0)
    net = Net()
    write_folder(folder / "base", {name: t.clone() for name, t in net.state_dict().items()})
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **config})
    model = get_peft_model(net, config)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", model.merge_and_unload().state_dict()


CASES = {
    "linear": dict(target_modules=["q_proj", "k_proj"]),
    "rslora": dict(target_modules=["q_proj"], use_rslora=True),
    "conv1d": dict(target_modules=["conv1d"], fan_in_fan_out=True),
    "embedding": dict(target_modules=["embed"]),
    "conv2d": dict(target_modules=["patches"]),
    "patterns": dict(
        target_modules=["q_proj", "k_proj"],
        rank_pattern={"k_proj": 2},
        alpha_pattern={r"q_.*": 7, "k_proj": 1},
    ),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_weights_are_those_peft_merges(tmp_path, config):
    base, adapter, expected = adapted(tmp_path, **config)
    checkpoint = LoraCheckpoint(Checkpoint.open(base), adapter)
    original = load_file(base / "model.safetensors")
    assert set(checkpoint.tensors) == set(original)
    changed = 0
    for key, tensor in expected.items():
        found = checkpoint.read(key)
        scale = float(tensor.abs().max()) + 10
        assert (found - tensor).abs().max() <= 4 * TOLERANCES[torch.float32] * scale
        for start in range(0, len(tensor), 2):
            rows = checkpoint.read(key, start, min(start + 2, len(tensor)))
            torch.testing.assert_close(rows, found[start : start + 2])
        changed += not torch.equal(found, original[key])
    assert changed == len(config["target_modules"])


def test_modules_to_save_take_the_place_of_the_base(tmp_path):
    config = dict(target_modules=["q_proj"], modules_to_save=["k_proj", "flat"])
    base, adapter, _ = adapted(tmp_path, **config)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    names = ["k_proj.weight", "flat.weight", "flat.bias"]
    for name in names:
        tensors["base_model.model." + name] += 1
    save_file(tensors, path)
    checkpoint = LoraCheckpoint(Checkpoint.open(base), adapter)
    assert checkpoint.changed == ["flat.bias", "flat.weight", "k_proj.weight", "q_proj.weight"]
    for name in names:
        expected = tensors["base_model.model." + name]
        assert torch.equal(checkpoint.read(name), expected)
        assert torch.equal(checkpoint.read(name, 1, 3), expected[1:3])
        assert checkpoint.factors(name) is None
    rows = torch.tensor([2, 0])
    assert torch.equal(
        checkpoint.read_rows("k_proj.weight", rows), tensors["base_model.model.k_proj.weight"][rows]
    )
    tensors["base_model.model.k_proj.weight"] = dense(3, 10)
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=r"has shape \[3, 10\], expected \[4, 10\] as 'k_proj"
    ):
        LoraCheckpoint(Checkpoint.open(base), adapter)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_factors_are_the_change_that_peft_merges(tmp_path, config):
    base, adapter, expected = adapted(tmp_path, **config)
    checkpoint = LoraCheckpoint(Checkpoint.open(base), adapter)
    original = load_file(base / "model.safetensors")
    for key in checkpoint.changed:
        down, up = checkpoint.factors(key)
        found = original[key] + (up @ down.flatten(1)).view(original[key].shape)
        torch.testing.assert_close(found, expected[key])
        assert down.shape[1:] == original[key].shape[1:]


def test_a_half_precision_base_is_computed_with_in_fp32(tmp_path):
    base, adapter, _ = adapted(tmp_path, target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, base / "model.safetensors")
    checkpoint = LoraCheckpoint(Checkpoint.open(base), adapter)
    assert checkpoint.read("q_proj.weight").dtype == torch.float32
    assert checkpoint.tensors["q_proj.weight"].dtype == torch.float32
    assert checkpoint.tensors["k_proj.weight"].dtype == torch.bfloat16


REFUSED = {
    "peft_type": "IA3",
    "use_dora": True,
    "bias": "all",
    "modules_to_save": "head",
    "init_lora_weights": "pissa_niter_4",
    "trainable_token_indices": [3],
    "r": 0,
    "lora_alpha": "16",
    "rank_pattern": {"(a+)+": 3},
    "alpha_pattern": ["q_proj"],
}


@pytest.mark.parametrize("setting", REFUSED)
def test_other_adapters_are_refused_by_name(tmp_path, setting):
    base, adapter, _ = adapted(tmp_path, target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: REFUSED[setting]}))
    with pytest.raises(CheckpointError, match=setting):
        LoraCheckpoint(Checkpoint.open(base), adapter)


A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({A: None}, "the other factor is missing"),
        ({A: dense(3, 7)}, r"q_proj.lora_A.weight' has shape \[3, 7\], expected \[3, 8\]"),
        ({A: dense(2, 8), B: dense(10, 2)}, r"expected \[3, 8\] .* rank 3"),
        ({"base_model.model.q_proj.lora_magnitude_vector": dense(10)}, "not a factor of a LoRA"),
        ({A.replace("q_", "z_"): dense(3, 8), B.replace("q_", "z_"): dense(10, 3)}, "no tensor"),
        (
            {A.replace("q_proj", "flat"): dense(3), B.replace("q_proj", "flat"): dense(10, 3)},
            r"'flat.weight' of base has shape \[10\], expected a matrix",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(tmp_path, changes, message):
    base, adapter, _ = adapted(tmp_path, target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: t for k, t in tensors.items() if t is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        LoraCheckpoint(Checkpoint.open(base), adapter)


def test_a_pickled_adapter_is_refused(tmp_path):
    base, adapter, _ = adapted(tmp_path, target_modules=["q_proj"])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle"):
        LoraCheckpoint(Checkpoint.open(base), adapter)


def test_the_hash_covers_base_adapter_and_configuration(tmp_path):
    base, adapter, _ = adapted(tmp_path, target_modules=["q_proj"])
    first = LoraCheckpoint(Checkpoint.open(base), adapter).hash()
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 6}))
    assert LoraCheckpoint(Checkpoint.open(base), adapter).hash() != first
