"""Similarity of checkpoints, their clusters, and greedy merges by a score."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastmerge as fm
from fastmerge import families

from .plain import make_experts
from .samples import random

SHAPES = {"w": (40, 27), "v": (61,), "conv": (5, 4, 3), "one": (), "empty": (0, 3)}


def models(count=4):
    def one(seed):
        return {n: random(s, torch.float32, seed + i) for i, (n, s) in enumerate(SHAPES.items())}

    base = one(0)
    steps = [one(100 * k) for k in range(1, count + 1)]
    return base, {f"e{k}": {n: base[n] + s[n] for n in base} for k, s in enumerate(steps)}


def flat(model):
    return torch.cat([t.flatten() for t in model.values()])


@pytest.mark.parametrize("small", [False, True])
def test_cosines_of_task_vectors_and_of_weights(small, monkeypatch):
    if small:
        monkeypatch.setattr(families, "BLOCK_ENTRIES", 64)
    base, experts = models()
    found = fm.similarity(base, experts)
    taus = torch.stack([(flat(e) - flat(base)).double() for e in experts.values()])
    assert found.names == list(experts)
    assert torch.allclose(found.norms, taus.norm(dim=1), rtol=1e-12)
    unit = taus / taus.norm(dim=1, keepdim=True)
    assert torch.allclose(found.cosines, unit @ unit.T, atol=1e-12)
    weights = torch.stack([flat(e).double() for e in experts.values()])
    unit = weights / weights.norm(dim=1, keepdim=True)
    assert torch.allclose(fm.similarity(None, experts).cosines, unit @ unit.T, atol=1e-12)
    part = fm.similarity(base, experts, include="w")
    assert torch.allclose(part.norms, taus[:, : 40 * 27].norm(dim=1), rtol=1e-12)


def test_modules_and_folders_give_what_state_dicts_give(tmp_path):
    base, experts = models()
    expected = fm.similarity(base, experts)
    for name, state in {"base": base, **experts}.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    found = fm.similarity(tmp_path / "base", {name: tmp_path / name for name in experts})
    assert torch.equal(found.cosines, expected.cosines) and found.names == expected.names

    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    tuned = make_experts(module, 2)
    states = [expert.state_dict() for expert in tuned]
    of_modules = fm.similarity(module, tuned)
    assert torch.equal(of_modules.cosines, fm.similarity(module.state_dict(), states).cosines)


def test_zero_task_vectors_and_wrong_models():
    base, experts = models(2)
    found = fm.similarity(base, {**experts, "same": base})
    assert found.norms[2] == 0 and found.cosines[2].tolist() == [0, 0, 1]
    experts["e1"]["w"] = experts["e1"]["w"][1:]
    with pytest.raises(ValueError, match=r"e1.*'w'"):
        fm.similarity(base, experts)


def test_clusters_are_complete_links():
    cosines = torch.eye(5, dtype=torch.float64)
    for i, j, value in [(0, 1, 0.6), (1, 2, 0.9), (0, 2, 0.3), (3, 4, 0.5)]:
        cosines[i, j] = cosines[j, i] = value
    found = fm.Similarity(list("abcde"), torch.ones(5), cosines)
    assert found.clusters(0.5) == [["a"], ["b", "c"], ["d", "e"]]  # a fits b, but not c
    assert found.clusters(0.3) == [["a", "b", "c"], ["d", "e"]]
    assert found.clusters(0.95) == [[name] for name in "abcde"]
    assert found.clusters(-1) == [list("abcde")]


def distance_to(goal):
    return lambda model: -float((flat(model).double() - goal).norm())


def test_greedy_merge_finds_the_weights_of_a_goal():
    base, experts = models(3)
    goal = 0.6 * flat(experts["e0"]).double() + 0.4 * flat(experts["e2"]).double()
    found = fm.greedy_merge(base, experts, distance_to(goal))
    assert found.weights == pytest.approx({"e0": 0.6, "e1": 0.0, "e2": 0.4})
    assert found.score == pytest.approx(distance_to(goal)(found.model)) and found.score > -1e-4
    assert len(found.trials) == 3 + 2 * 9
    weight = [found.weights[name] for name in ("e0", "e2")]
    pair = [experts["e0"], experts["e2"]]
    again = fm.merge(base, pair, "linear", weight=weight, normalize=False)
    assert torch.equal(flat(again), flat(found.model))


def test_nothing_is_kept_that_does_not_improve():
    base, experts = models(3)
    found = fm.greedy_merge(base, experts, distance_to(flat(experts["e1"]).double()))
    assert found.weights == {"e0": 0.0, "e1": 1.0, "e2": 0.0}
    assert torch.equal(flat(found.model), flat(experts["e1"]))
    same = fm.greedy_merge(base, experts, lambda model: 1.0)
    assert sum(map(bool, same.weights.values())) == 1  # as good is not better


def test_another_method_chooses_its_experts():
    base, experts = models(4)
    goal = flat(fm.merge(base, [experts["e1"], experts["e3"]], "average")).double()
    found = fm.greedy_merge(base, experts, distance_to(goal), method="average")
    assert found.weights == {"e0": 0.0, "e1": 1.0, "e2": 0.0, "e3": 1.0}
    assert found.score == pytest.approx(0, abs=1e-5) and len(found.trials) == 4 + 3


def test_folders_and_modules(tmp_path):
    base, experts = models(2)
    for name, state in {"base": base, **experts}.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    goal = 0.5 * (flat(experts["e0"]) + flat(experts["e1"])).double()
    folders = {name: tmp_path / name for name in experts}
    before = sorted(p.name for p in tmp_path.iterdir())

    def score(folder):
        return distance_to(goal)({n: load_file(folder / "model.safetensors")[n] for n in SHAPES})

    found = fm.greedy_merge(tmp_path / "base", folders, score, grid=[0.25, 0.5], out=tmp_path / "m")
    assert found.model == tmp_path / "m" and found.weights == {"e0": 0.5, "e1": 0.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "m"])
    assert score(tmp_path / "m") == found.score

    module = nn.Linear(3, 2)
    best = fm.greedy_merge(
        module, make_experts(module, 2), lambda m: -float(m.weight.detach().norm())
    )
    assert isinstance(best.model, nn.Linear) and list(best.weights) == ["expert0", "expert1"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out": "there"}, TypeError, "out is for checkpoint folders"),
        ({"grid": []}, ValueError, "grid must hold weights between 0 and 1"),
        ({"grid": [0.5, 1.0]}, ValueError, "grid must hold weights between 0 and 1"),
        ({"score": lambda model: math.nan}, ValueError, "is NaN"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    base, experts = models(2)
    with pytest.raises(error, match=message):
        fm.greedy_merge(base, experts, **{"score": lambda model: 0.0, **options})
