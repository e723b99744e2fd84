"""Saving, loading, copying, moving and converting models with merged weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import fastmerge as fm
from fastmerge.merged_weight import MergedWeight

from .attached import attached


@pytest.fixture
def it():
    return attached()


def _same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert type(value) is torch.Tensor
        torch.testing.assert_close(value, expected[name])


def test_safetensors(it, tmp_path):
    save_file(it.net.state_dict(), tmp_path / "state.safetensors")
    save_model(it.net, tmp_path / "model.safetensors")
    for name in ("state", "model"):
        _same(load_file(tmp_path / f"{name}.safetensors"), it.built())
    with pytest.raises(RuntimeError, match=r"'up\.weight' has no memory .* model\.state_dict\(\)"):
        save_file(dict(it.net.named_parameters()), tmp_path / "parameters.safetensors")
    with pytest.raises(RuntimeError, match=r"fastmerge\.materialize"):
        load_model(it.net, tmp_path / "model.safetensors")


def test_torch_save(it):
    file = io.BytesIO()
    torch.save(it.net.state_dict(), file)
    file.seek(0)
    _same(torch.load(file, weights_only=True), it.built())
    for refused in (it.net, it.weight, dict(it.net.named_parameters())):
        with pytest.raises(TypeError, match=r"'up\.weight' cannot be pickled; save model\.state"):
            torch.save(refused, io.BytesIO())


def test_pickle(it):
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(it.net)
    fm.materialize(it.net)
    clone = pickle.loads(pickle.dumps(it.net))
    assert torch.equal(clone(it.x), it.net(it.x))
    with pytest.raises(ValueError, match=r"fastmerge\.attach first"):
        fm.detach(clone)
    fm.attach(clone, it.experts)


def test_state_dict(it):
    _same(it.net.state_dict(), it.built())
    _same(it.net.up.state_dict(), {n: it.built()[f"up.{n}"] for n in ("weight", "bias")})
    assert it.net.state_dict(keep_vars=True)["up.weight"] is it.weight
    it.net.register_buffer("kept", it.weight.detach())
    assert type(it.net.state_dict()["kept"]) is torch.Tensor
    fm.detach(it.net)
    assert not it.net._state_dict_hooks and not it.net.up._load_state_dict_pre_hooks


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
def test_load_state_dict(it, options):
    with pytest.raises(RuntimeError, match=r"change merged weight 'up\.weight'.*before fastmerge"):
        it.net.load_state_dict(it.base.state_dict(), **options)
    with pytest.raises(RuntimeError, match=r"change merged weight 'weight'"):
        it.net.up.load_state_dict(it.base.up.state_dict(), **options)
    assert it.learns()
    fm.materialize(it.net).load_state_dict(it.base.state_dict(), **options)
    assert torch.equal(it.net(it.x), it.base(it.x))


def test_load_state_dict_beside_merged_weights():
    it = attached()
    fm.detach(it.net)
    coefficients = fm.attach(it.net, it.experts, include="up.*")
    other = {"down.bias": torch.full((3,), 2.0)}
    it.net.load_state_dict(other, strict=False)
    assert torch.equal(it.net.down.bias.data, other["down.bias"])
    assert coefficients.names == ["up.weight", "up.bias"]


def test_conversions_with_nothing_to_do(it):
    it.net.float().cpu().to("cpu").to(torch.float32).to(device="cpu", dtype=torch.float32)
    assert isinstance(it.net.up.weight, MergedWeight) and it.learns()
    for same in (it.weight.float(), it.weight.cpu(), it.weight.contiguous(), it.weight.to(it.x)):
        assert same is it.weight


@pytest.mark.parametrize(
    "convert",
    [
        lambda net: net.to(torch.bfloat16),
        lambda net: net.half(),
        lambda net: net.bfloat16(),
        lambda net: net.double(),
        lambda net: net.to("meta"),
        lambda net: net.to_empty(device="cpu"),
        lambda net: net.type(torch.float64),
    ],
)
def test_conversions(it, convert):
    with pytest.raises(RuntimeError, match=r"convert or wrap the model before fastmerge\.attach"):
        convert(it.net)
    assert it.learns()


@pytest.mark.parametrize("swap", [True, False])
def test_conversions_that_replace_parameters(it, swap):
    name = "swap" if swap else "overwrite"
    switch = getattr(torch.__future__, f"set_{name}_module_params_on_conversion")
    switch(True)
    try:
        with pytest.raises((RuntimeError, AssertionError)):
            it.net.to(torch.bfloat16)
    finally:
        switch(False)
    assert it.learns()


def test_cuda(it):
    if torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"before fastmerge\.attach"):
            it.net.cuda()
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            it.net.cuda()
    assert it.learns()


def test_converting_one_weight_gives_a_copy_with_its_gradient(it):
    half = it.weight.to(torch.bfloat16)
    assert type(half) is torch.Tensor and half.dtype == torch.bfloat16
    half.float().sum().backward()
    assert it.coefficients.raw.grad[0].abs().min() > 0


def test_deepcopy(it):
    expected = it.gradient()
    clone = copy.deepcopy(it.net)
    model, coefficients = copy.deepcopy((it.net, it.coefficients))
    assert model.up.weight.coefficients is coefficients
    with torch.no_grad():
        it.coefficients.raw.fill_(0.0)
    clone(it.x).square().sum().backward()
    own = clone.up.weight.coefficients
    torch.testing.assert_close(own.raw.grad, expected)
    assert it.coefficients.raw.grad is None
    assert type(fm.materialize(clone).up.weight) is nn.Parameter
    assert isinstance(it.net.up.weight, MergedWeight)


def test_copy_shares_everything(it):
    other = copy.copy(it.net)
    assert other.up.weight is it.weight
    again = copy.copy(it.weight)
    again.sum().backward()
    assert it.coefficients.raw.grad[0].abs().min() > 0


def test_other_processes(it):
    for share in (it.net.share_memory, it.weight.share_memory_):
        with pytest.raises(RuntimeError, match="share_memory_ would change merged weight"):
            share()
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.multiprocessing.SimpleQueue().put(it.weight)


def test_memory_and_pointers(it):
    for name in ("data_ptr", "storage", "untyped_storage", "storage_type"):
        with pytest.raises(RuntimeError, match=f"{name}: merged weight 'up.weight' has no memory"):
            getattr(it.weight, name)()
    for function in (torch.Tensor.data_ptr, torch.Tensor.untyped_storage):
        with pytest.raises(RuntimeError, match="has no memory"):
            function(it.weight)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(it.weight)
    with pytest.raises(BufferError, match="detach"):
        torch.from_dlpack(it.weight)


def test_numpy(it):
    with pytest.raises(RuntimeError, match="detach"):
        it.weight.numpy()
    expected = it.built()["up.weight"]
    torch.testing.assert_close(torch.from_numpy(it.weight.detach().numpy()), expected)


def test_looking_at_a_weight(it):
    weight, expected = it.weight, it.built()["up.weight"]
    assert weight.shape == (8, 6) and weight.stride() == (6, 1) and weight.is_contiguous()
    assert (weight.dtype, weight.device) == (torch.float32, torch.device("cpu"))
    assert (weight.numel(), weight.nbytes, weight.storage_offset(), len(weight)) == (48, 192, 0, 8)
    assert repr(weight).startswith("MergedWeight('up.weight'") and f"{weight}"[:6] == "tensor"
    copied = weight.combined()
    assert torch.equal(weight, copied) and torch.equal(copied, weight) and weight.equal(copied)
    assert torch.allclose(weight, expected) and bool((weight == copied).all())
    assert weight in {weight: 1} and weight in set(it.net.parameters())
    assert weight[1, 2].item() == copied[1, 2].item() and weight[0].tolist() == copied[0].tolist()
    assert isinstance(weight, nn.Parameter) and not isinstance(weight.detach(), nn.Parameter)


def test_accelerate(it):
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(it.net)
    assert it.learns(prepared(it.x))
    with pytest.raises(RuntimeError, match=r"fastmerge\.materialize"):
        accelerate.cpu_offload(it.net, execution_device="cpu")
    with pytest.raises(RuntimeError, match=r"fastmerge\.materialize"):
        accelerate.dispatch_model(it.net, {"": "cpu"}, force_hooks=True)
