"""Twin-Merging of LoRA adapters: their products, or their factors each by itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import fastmerge as fm
from fastmerge.deltas import Dense, FactorPairs
from fastmerge.modules.twin import TwinMerging

from .samples import random
from .test_adapters import IDS, adapters, base_net
from .tolerances import TOLERANCES

CONFIGS = {
    "linear": dict(target_modules=["q_proj", "score"]),
    "transposed": dict(target_modules=["conv1d"], fan_in_fan_out=True),
    "convolution": dict(target_modules=["patches"]),
}
MIXED = torch.cat([IDS, IDS.flip(0), IDS.flip(1)])


def close(found, expected):
    scale = float(expected.abs().max()) + 1
    assert float((found - expected).detach().abs().max()) <= 64 * TOLERANCES[torch.float32] * scale


def three(folder, name):
    return adapters(folder, [CONFIGS[name]] * 3)


def written_out(paths):
    """Each adapter's weights, as the default of `attach` forms them."""
    states = []
    for path in paths:
        net = base_net()
        fm.attach(net, [path], init=1.0)
        states.append({n: t.detach().clone() for n, t in net.state_dict().items()})
    return states


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lora", ["product", "factors"])
def test_one_hot_and_enough_rank_is_each_adapter(tmp_path, lora, name):
    paths = three(tmp_path, name)
    twin = TwinMerging.build(base_net(), paths, lora=lora, rank=12)
    ids = [2, 0, 1, 1, 0, 2]
    with twin.select(F.one_hot(torch.tensor(ids), 3).float()):
        found = twin(MIXED)
    states = written_out(paths)
    for row, k in enumerate(ids):
        close(found[row : row + 1], functional_call(base_net(), states[k], (MIXED[row : row + 1],)))
    for k, state in enumerate(states):
        folded = twin.fold(twin.tasks[k])
        assert set(folded) == set(state)
        for key, tensor in state.items():
            close(folded[key], tensor)


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_are_mixed_each_by_itself(tmp_path, name):
    """base + (B_s + sum w_k b_k)(A_s + sum w_k a_k), for each sample and for all alike."""
    twin = TwinMerging.build(base_net(), three(tmp_path, name), lora="factors", rank=2, shared=0.29)
    rows = random((6, 3), torch.float32, 3).softmax(-1)
    plain = base_net()
    for lam in (rows, rows[0]):
        with twin.select(lam):
            found = twin(MIXED)
        for b, row in enumerate(lam.expand(6, 3)):
            state = {n: t.clone() for n, t in plain.state_dict().items()}
            for key, weight in twin._weights().items():
                pairs = weight.deltas
                assert isinstance(pairs, FactorPairs)
                assert all(torch.linalg.matrix_rank(t.flatten(1)) <= 2 for t in pairs.ups.tensors)
                low = pairs.down + sum(w * t for w, t in zip(row, pairs.downs.tensors, strict=True))
                high = pairs.up + sum(w * t for w, t in zip(row, pairs.ups.tensors, strict=True))
                state[key] += (high @ low.flatten(1)).view(state[key].shape)
            close(found[b : b + 1], functional_call(plain, state, (MIXED[b : b + 1],)))


def test_products_and_factors_differ(tmp_path):
    paths = three(tmp_path, "linear")
    rows, found = torch.full((6, 3), 1 / 3), []
    for lora in ("product", "factors"):
        twin = TwinMerging.build(base_net(), paths, lora=lora, rank=12)
        with twin.select(rows):
            found.append(twin(MIXED))
    assert float((found[0] - found[1]).detach().abs().max()) > 1e-3


def test_factors_are_saved(tmp_path):
    net = base_net()
    twin = TwinMerging.build(net, three(tmp_path, "linear"), lora="factors")
    again = TwinMerging.restore(net, twin.tensors(), twin.config())
    rows = random((6, 3), torch.float32, 3)
    with twin.select(rows), again.select(rows):
        assert torch.equal(twin(MIXED), again(MIXED))
    assert isinstance(again._weights()["q_proj.weight"].deltas.ups, Dense)


def test_what_factors_refuse(tmp_path):
    configs = [dict(target_modules=["q_proj"], r=2), dict(target_modules=["q_proj"], r=5)]
    paths = adapters(tmp_path, configs)
    before = copy.deepcopy(base_net().state_dict())
    net = base_net()
    for options, message in (
        (dict(lora="factors"), r"'q_proj.weight': the adapters have ranks \[2, 5\]"),
        (dict(lora="sum"), "lora must be one of product, factors, got 'sum'"),
        (dict(lora="factors", shared={"method": "ties"}), "needs a number as shared="),
        (dict(lora="factors", rank=0), "rank must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TwinMerging.build(net, paths, **options)
    with pytest.raises(ValueError, match="expert0: Net is no adapter folder"):
        TwinMerging.build(net, [base_net()], lora="factors")
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    pairs = FactorPairs(torch.zeros(2, 3), torch.zeros(4, 2), Dense([]), Dense([]))
    for call in (
        lambda: pairs.entry(0),
        lambda: pairs.task_vectors(torch.zeros(4, 3), torch.float32),
        lambda: pairs.coefficient_grad(torch.zeros(4, 3)),
    ):
        with pytest.raises(NotImplementedError):
            call()
