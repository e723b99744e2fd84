"""Experts as modules, state dicts, checkpoint folders, safetensors files and LoRA adapters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

import fastmerge as fm
from fastmerge.sources import read_experts

from .checkpoints import write_folder
from .layouts import IDS, gpt2, transformers
from .plain import make_experts


@pytest.fixture
def model():
    torch.manual_seed(0)
    return gpt2()[0].float()


@pytest.fixture
def experts(model):
    return make_experts(model, 3)


def _state(expert):
    """What save_pretrained writes: the tied head once."""
    return {k: v for k, v in expert.state_dict().items() if k != "lm_head.weight"}


def _shards(state, count):
    names = list(state)
    return [{n: state[n].contiguous() for n in names[i::count]} for i in range(count)]


def _sources(folder, experts):
    """The same experts in every form."""
    states = [_state(expert) for expert in experts]
    files = [folder / f"{k}.safetensors" for k in range(len(experts))]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    pretrained = [folder / f"hf{k}" for k in range(len(experts))]
    for expert, path in zip(experts, pretrained, strict=True):
        expert.save_pretrained(path)
    return {
        "modules": experts,
        "state dicts": states,
        "files": files,
        "paths as text": [str(file) for file in files],
        "folders": [write_folder(folder / f"one{k}", s) for k, s in enumerate(states)],
        "shards with an index": [
            write_folder(folder / f"three{k}", *_shards(s, 3)) for k, s in enumerate(states)
        ],
        "shards without an index": [
            write_folder(folder / f"bare{k}", *_shards(s, 2), index=False)
            for k, s in enumerate(states)
        ],
        "save_pretrained": pretrained,
        "of every kind": [experts[0], states[1], files[2]],
    }


def test_every_source_gives_the_same_bytes(model, experts, tmp_path):
    ids = torch.tensor(IDS)
    results = {}
    for kind, source in _sources(tmp_path, experts).items():
        merged = copy.deepcopy(model)
        coefficients = fm.attach(merged, source, init=[0.2, 0.5, 0.3])
        y = merged(input_ids=ids)[0]
        (gradient,) = torch.autograd.grad(y.square().sum(), [coefficients.raw])
        ties = fm.merge(model, source, method="ties", density=0.3)
        results[kind] = [y.detach(), gradient, *ties.state_dict().values()]
    for kind, found in results.items():
        for ours, theirs in zip(found, results["modules"], strict=True):
            assert torch.equal(ours, theirs), kind


def test_checkpoints_are_mapped_and_not_copied(model, experts, tmp_path):
    file = tmp_path / "expert.safetensors"
    save_file(_state(experts[0]), file)
    fm.attach(model, {"expert": file})
    deltas = [p.deltas.tensors[0] for p in model.parameters()]
    storages = {t.untyped_storage().data_ptr() for t in deltas}
    assert len(storages) == 1
    assert deltas[0].untyped_storage().nbytes() == file.stat().st_size


@pytest.mark.parametrize("attached", [True, False])
def test_errors_name_the_expert_and_change_nothing(model, experts, tmp_path, attached):
    call = fm.attach if attached else lambda m, e: fm.merge(m, e, method="average")
    before = dict(model.named_parameters())
    state = _state(experts[0])
    good = write_folder(tmp_path / "good", state)
    del state["transformer.h.1.mlp.c_fc.weight"]
    lacking = write_folder(tmp_path / "lacking", state)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(state, pickled / "pytorch_model.bin")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    for bad, message in (
        (lacking, r"second: tensor 'transformer\.h\.1\.mlp\.c_fc\.weight' is missing"),
        (pickled, "pytorch_model.bin"),
        (tmp_path / "absent", "absent"),
        (tmp_path / "garbage.safetensors", "garbage.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            call(model, {"first": good, "second": bad})
    with pytest.raises(TypeError, match="expected a list of experts"):
        call(model, str(good))
    assert all(p is before[name] for name, p in model.named_parameters())


def _write_adapter(folder, rank=2, seed=0):
    """A LoRA of both kinds of layout: GPT-2's Conv1D (fan_in_fan_out)."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {}
    for block in range(2):
        prefix = f"base_model.model.transformer.h.{block}.attn.c_attn"
        factors[f"{prefix}.lora_A.weight"] = torch.randn(rank, 16, generator=generator)
        factors[f"{prefix}.lora_B.weight"] = torch.randn(48, rank, generator=generator)
    save_file(factors, folder / "adapter_model.safetensors")
    return folder, factors


def test_lora_adapters(model, tmp_path):
    adapters = [_write_adapter(tmp_path / f"lora{k}", seed=k) for k in range(2)]
    experts = []
    for _, factors in adapters:
        expert = copy.deepcopy(model)
        for block in range(2):
            prefix = f"base_model.model.transformer.h.{block}.attn.c_attn"
            change = factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
            expert.transformer.h[block].attn.c_attn.weight.data += 3 / 2 * change.t()
        experts.append(expert)
    expected = fm.merge(model, experts, method="task_arithmetic", scaling=0.4)
    folders = {f"task{k}": folder for k, (folder, _) in enumerate(adapters)}
    merged = fm.merge(model, folders, method="task_arithmetic", scaling=0.4)
    coefficients = fm.attach(model, folders, init=0.4)
    assert coefficients.experts == ["task0", "task1"]
    fm.materialize(model)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    changed = "transformer.h.0.attn.c_attn.weight"
    assert (merged.state_dict()[changed] - fm.detach(model).state_dict()[changed]).abs().max() > 0.1


def test_adapters_follow_their_base_to_its_device(tmp_path):
    folder, factors = _write_adapter(tmp_path / "lora")
    names = [f"transformer.h.{block}.attn.c_attn.weight" for block in range(2)]
    base = {name: torch.zeros(16, 48, device="meta") for name in names}
    (expert,) = read_experts([folder], base).values()
    assert {tensor.device.type for tensor in expert.values()} == {"meta"} and factors


def test_a_checkpoint_of_half_precision_in_a_folder_of_hugging_face(model, experts, tmp_path):
    experts[0].bfloat16().save_pretrained(tmp_path / "hf")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = fm.merge(model, [loaded], method="task_arithmetic", scaling=1.0)
    found = fm.merge(model, [tmp_path / "hf"], method="task_arithmetic", scaling=1.0)
    assert all(torch.equal(v, found.state_dict()[n]) for n, v in expected.state_dict().items())
