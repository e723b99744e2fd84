"""Coefficients that follow from depth: LiNeS and the anchor ramp."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmerge as fm
from fastmerge.blocks import block_positions
from fastmerge.methods import Block, make_method, run_passes

from .samples import random, raw
from .ties_oracle import ties_oracle
from .tolerances import TOLERANCES

BLOCKS = 3
SHAPES = {
    "embed.weight": (11, 6),
    **{f"layers.{i}.{part}": shape for i in range(BLOCKS) for part, shape in
       (("weight", (6, 6)), ("bias", (6,)))},
    "norm.weight": (6,),
    "head.weight": (5, 6),
}  # fmt: skip


def models(count=3, dtype=torch.float32):
    def one(seed):
        return {n: random(s, dtype, seed + i) for i, (n, s) in enumerate(SHAPES.items())}

    return one(0), {f"t{k}": one(100 * k) for k in range(1, count + 1)}


def depth_of(name):
    return int(name.split(".")[1]) / (BLOCKS - 1) if name.startswith("layers") else 0.0


def near(found, expected, scale):
    error = (found.double() - expected).abs()
    assert (error <= 8 * TOLERANCES[torch.float32] * scale).all(), error.max()


def test_positions_run_over_stages_and_apart_for_other_lists():
    names = [
        "embed.weight", "decoder.block.0.w", "decoder.block.1.w",
        "stages.0.layers.0.w", "stages.0.layers.1.w", "stages.1.layers.0.w", "stages.1.layers.2.w",
        "single.0.w", "decoder.block.1.layer.7.w",
    ]  # fmt: skip
    found = block_positions(names)
    thirds = [0, 1 / 3, 2 / 3, 1]
    assert [found[n] for n in names] == [None, 0, 1, *thirds, 1, 1]


@pytest.mark.parametrize("alpha", [None, 0.1, -0.2])
def test_lines_is_its_formula(alpha):
    base, experts = models()
    merged = fm.merge(base, experts, "lines", alpha=alpha, beta=0.4)
    start = 1 / 3 if alpha is None else alpha
    for name, origin in base.items():
        taus = torch.stack([e[name].double() - origin.double() for e in experts.values()])
        factor = start + 0.4 * depth_of(name)
        scale = origin.double().abs() + abs(factor) * (taus.abs() + origin.abs()).sum(0)
        near(merged[name], origin.double() + factor * taus.sum(0), scale)


@pytest.mark.parametrize(
    ("vectors", "method", "parameters"),
    [
        ("plain", "task_arithmetic", {}),
        ("ties", "ties", {"density": 0.3, "merge": "sum"}),
        ("dare", "dare_linear", {"density": 0.5, "rescale": "density"}),
    ],
)
def test_without_a_slope_it_is_the_method_it_scales(vectors, method, parameters):
    base, experts = models()
    density = parameters.get("density", 1.0)
    flat = fm.merge(
        base, experts, "lines", alpha=0.25, beta=0.0, vectors=vectors, density=density, seed=3
    )
    plain = fm.merge(base, experts, method, scaling=0.25, seed=3, **parameters)
    assert {n: raw(t) for n, t in flat.items()} == {n: raw(t) for n, t in plain.items()}


def test_alpha_of_trimmed_vectors_makes_up_for_their_norm():
    base, experts = models()
    taus = torch.stack(
        [torch.cat([(e[n] - base[n]).flatten() for n in base]) for e in experts.values()]
    ).double()
    merged, _, _ = ties_oracle(taus, 0.3, "sum")
    expected = float(taus.sum(0).abs().sum() / merged.abs().sum())

    def blocks():
        return [Block(n, base[n], [e[n] for e in experts.values()]) for n in base]

    method = make_method("lines", vectors="ties", density=0.3)
    found = run_passes(method.passes(torch.float32), blocks).model["alpha"]
    assert found == pytest.approx(expected, rel=1e-6)
    same = [base for _ in experts]
    assert raw(fm.merge(base, same, method)["head.weight"]) == raw(base["head.weight"])


def test_lines_coefficients_merge_alike_and_start_learning():
    base, experts = models()
    coefficients = fm.lines_coefficients(base, experts, beta=0.4)
    assert coefficients.names == list(base) and coefficients.experts == list(experts)
    method = fm.merge(base, experts, "lines", beta=0.4)
    merged = fm.merge(base, experts, coefficients=coefficients)
    assert {n: raw(t) for n, t in merged.items()} == {n: raw(t) for n, t in method.items()}

    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(BLOCKS)])
    states = [{n: t for n, t in e.items() if n.startswith("layers")} for e in experts.values()]
    start = fm.lines_coefficients(model, states, alpha=0.1, beta=0.4)
    attached = fm.attach(model, states, granularity="layer", init=start, clamp=None)
    expected = [0.1 + 0.4 * depth_of(name) for name in attached.names]
    assert torch.equal(attached.matrix(), torch.tensor(expected).unsqueeze(1).expand(-1, 3))


@pytest.mark.parametrize("anchor", [0, 2])
def test_the_anchor_ramp_is_its_formula(anchor):
    base, experts = models()
    merged = fm.merge(base, experts, "anchor_ramp", anchor=anchor)
    others = [k for k in range(3) if k != anchor]
    for name in base:
        points = torch.stack([e[name].double() for e in experts.values()])
        depth = 1.0 if name in ("norm.weight", "head.weight") else depth_of(name)
        own = 1 / 3 + 2 / 3 * depth
        expected = own * points[anchor] + (1 - own) / 2 * points[others].sum(0)
        near(merged[name], expected, 2 * points.abs().sum(0))
        if depth == 1:
            assert raw(merged[name]) == raw(list(experts.values())[anchor][name])
    average = fm.merge(base, experts, "average")
    for name in ("embed.weight", "layers.0.weight"):
        assert raw(merged[name]) == raw(average[name])


def test_anchor_coefficients_give_the_same_merge():
    base, experts = models()
    by_name = fm.anchor_coefficients(base, experts, anchor="t2")
    assert torch.equal(by_name.matrix(), fm.anchor_coefficients(base, experts, anchor=1).matrix())
    assert torch.allclose(by_name.matrix().sum(1), torch.ones(len(base)))
    merged = fm.merge(base, experts, coefficients=by_name)
    method = fm.merge(base, experts, "anchor_ramp", anchor=1)
    for name in base:
        scale = base[name].abs() + sum(e[name].abs() + base[name].abs() for e in experts.values())
        near(merged[name], method[name].double(), scale)


@pytest.mark.parametrize("anchor", ["nobody", 3, -1, None])
def test_unknown_anchors_are_named(anchor):
    base, experts = models()
    with pytest.raises(ValueError, match="is none of two or more experts"):
        fm.anchor_coefficients(base, experts, anchor=anchor)


def test_one_expert_has_no_anchor_and_none_no_coefficients():
    base, experts = models(1)
    with pytest.raises(ValueError, match="two or more experts"):
        fm.anchor_coefficients(base, experts)
    with pytest.raises(ValueError, match="takes >= 2 experts, got 1"):
        fm.merge(base, experts, "anchor_ramp")
    with pytest.raises(ValueError, match="at least one expert"):
        fm.lines_coefficients(base, [])
